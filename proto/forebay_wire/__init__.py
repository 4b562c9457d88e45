"""What two Forebay processes must agree on: ids, tables, manifests, order, errors and limits."""
