"""Other frameworks' plugins; each module needs its framework, and nothing else imports it."""
