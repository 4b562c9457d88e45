-- A catalog of schema 1, as the first release of that schema made it.

CREATE TABLE blobs (
    blob VARCHAR(64) NOT NULL,
    num_bytes BIGINT NOT NULL,
    num_segments BIGINT NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (blob)
);

CREATE TABLE datasets (
    name VARCHAR(128) NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (name)
);

CREATE TABLE files (
    file VARCHAR(32) NOT NULL,
    tier VARCHAR(128) NOT NULL,
    num_bytes BIGINT NOT NULL,
    state VARCHAR(16) NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (file),
    CONSTRAINT state_is_known CHECK (state IN ('live', 'missing'))
);

CREATE INDEX files_by_tier ON files (tier);

CREATE TABLE jobs (
    job VARCHAR(32) NOT NULL,
    kind VARCHAR(32) NOT NULL,
    target VARCHAR(512) NOT NULL,
    state VARCHAR(16) NOT NULL,
    owner VARCHAR(64),
    expires DOUBLE,
    tries INTEGER NOT NULL,
    done_bytes BIGINT NOT NULL,
    total_bytes BIGINT NOT NULL,
    error TEXT NOT NULL,
    not_before DOUBLE NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (job),
    CONSTRAINT state_is_known CHECK (state IN ('queued', 'running', 'done', 'failed')),
    CONSTRAINT running_is_leased CHECK ((state = 'running') = (owner IS NOT NULL AND expires IS NOT NULL))
);

CREATE INDEX jobs_by_turn ON jobs (state, not_before);

CREATE UNIQUE INDEX one_live_job ON jobs (kind, target) WHERE state IN ('queued', 'running');

CREATE TABLE manifests (
    manifest VARCHAR(64) NOT NULL,
    kind INTEGER NOT NULL,
    data BLOB NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (manifest)
);

CREATE TABLE nodes (
    node VARCHAR(32) NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (node)
);

CREATE TABLE runs (
    run VARCHAR(128) NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (run)
);

CREATE TABLE settings (
    "key" VARCHAR(128) NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY ("key")
);

CREATE TABLE attempts (
    run VARCHAR(128) NOT NULL,
    attempt INTEGER NOT NULL,
    parent_attempt INTEGER,
    parent_step BIGINT,
    num_ranks INTEGER NOT NULL,
    request VARCHAR(64) NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (run, attempt),
    FOREIGN KEY(run) REFERENCES runs (run),
    UNIQUE (request)
);

CREATE TABLE manifest_blobs (
    manifest VARCHAR(64) NOT NULL,
    blob VARCHAR(64) NOT NULL,
    PRIMARY KEY (manifest, blob),
    FOREIGN KEY(manifest) REFERENCES manifests (manifest) ON DELETE CASCADE,
    FOREIGN KEY(blob) REFERENCES blobs (blob)
);

CREATE INDEX manifest_blobs_by_blob ON manifest_blobs (blob);

CREATE TABLE manifest_remote (
    manifest VARCHAR(64) NOT NULL,
    at DOUBLE NOT NULL,
    PRIMARY KEY (manifest),
    FOREIGN KEY(manifest) REFERENCES manifests (manifest) ON DELETE CASCADE
);

CREATE TABLE replicas (
    replica VARCHAR(32) NOT NULL,
    blob VARCHAR(64) NOT NULL,
    tier VARCHAR(128) NOT NULL,
    node VARCHAR(32) NOT NULL,
    encoding VARCHAR(16) NOT NULL,
    state VARCHAR(16) NOT NULL,
    reason TEXT NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (replica),
    CONSTRAINT state_is_known CHECK (state IN ('live', 'quarantined')),
    FOREIGN KEY(blob) REFERENCES blobs (blob)
);

CREATE UNIQUE INDEX one_live_replica ON replicas (blob, tier, node) WHERE state = 'live';

CREATE INDEX replicas_by_blob ON replicas (blob);

CREATE TABLE uploads (
    session VARCHAR(32) NOT NULL,
    owner VARCHAR(512) NOT NULL,
    uid BIGINT NOT NULL,
    tier VARCHAR(128) NOT NULL,
    file VARCHAR(32) NOT NULL,
    state VARCHAR(16) NOT NULL,
    blob VARCHAR(64),
    expires DOUBLE NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (session),
    CONSTRAINT state_is_known CHECK (state IN ('open', 'sealed', 'landed')),
    CONSTRAINT landed_is_a_blob CHECK (state <> 'landed' OR blob IS NOT NULL),
    UNIQUE (file),
    FOREIGN KEY(blob) REFERENCES blobs (blob)
);

CREATE INDEX uploads_by_blob ON uploads (blob);

CREATE INDEX uploads_by_expiry ON uploads (expires);

CREATE INDEX uploads_by_owner ON uploads (uid, owner, expires);

CREATE TABLE versions (
    dataset VARCHAR(128) NOT NULL,
    version INTEGER NOT NULL,
    manifest VARCHAR(64) NOT NULL,
    num_rows BIGINT NOT NULL,
    num_bytes BIGINT NOT NULL,
    num_shards INTEGER NOT NULL,
    request VARCHAR(64) NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (dataset, version),
    FOREIGN KEY(dataset) REFERENCES datasets (name),
    FOREIGN KEY(manifest) REFERENCES manifests (manifest),
    UNIQUE (request)
);

CREATE TABLE extents (
    replica VARCHAR(32) NOT NULL,
    seq INTEGER NOT NULL,
    blob_offset BIGINT NOT NULL,
    file VARCHAR(32) NOT NULL,
    file_offset BIGINT NOT NULL,
    num_bytes BIGINT NOT NULL,
    PRIMARY KEY (replica, seq),
    FOREIGN KEY(replica) REFERENCES replicas (replica) ON DELETE CASCADE,
    FOREIGN KEY(file) REFERENCES files (file)
);

CREATE INDEX extents_by_file ON extents (file);

CREATE TABLE generations (
    run VARCHAR(128) NOT NULL,
    attempt INTEGER NOT NULL,
    step BIGINT NOT NULL,
    state VARCHAR(16) NOT NULL,
    num_ranks INTEGER NOT NULL,
    manifest VARCHAR(64),
    metrics TEXT NOT NULL,
    dataset TEXT NOT NULL,
    error TEXT NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (run, attempt, step),
    CONSTRAINT state_is_known CHECK (state IN ('open', 'sealed', 'committed', 'aborted', 'failed')),
    CONSTRAINT committed_is_a_manifest CHECK ((state = 'committed') = (manifest IS NOT NULL)),
    FOREIGN KEY(run, attempt) REFERENCES attempts (run, attempt),
    FOREIGN KEY(manifest) REFERENCES manifests (manifest)
);

CREATE TABLE selections (
    dataset VARCHAR(128) NOT NULL,
    version INTEGER NOT NULL,
    name VARCHAR(128) NOT NULL,
    manifest VARCHAR(64) NOT NULL,
    num_rows BIGINT NOT NULL,
    created DOUBLE NOT NULL,
    PRIMARY KEY (dataset, version, name),
    FOREIGN KEY(dataset, version) REFERENCES versions (dataset, version),
    FOREIGN KEY(manifest) REFERENCES manifests (manifest)
);

CREATE TABLE packs (
    run VARCHAR(128) NOT NULL,
    attempt INTEGER NOT NULL,
    step BIGINT NOT NULL,
    rank INTEGER NOT NULL,
    state VARCHAR(16) NOT NULL,
    session VARCHAR(32) NOT NULL,
    blob VARCHAR(64),
    num_bytes BIGINT NOT NULL,
    description BLOB,
    created DOUBLE NOT NULL,
    PRIMARY KEY (run, attempt, step, rank),
    CONSTRAINT state_is_known CHECK (state IN ('open', 'sealed', 'landed')),
    CONSTRAINT landed_is_a_blob CHECK (state <> 'landed' OR blob IS NOT NULL),
    FOREIGN KEY(run, attempt, step) REFERENCES generations (run, attempt, step) ON DELETE CASCADE,
    UNIQUE (session),
    FOREIGN KEY(blob) REFERENCES blobs (blob)
);

CREATE INDEX packs_by_blob ON packs (blob);
