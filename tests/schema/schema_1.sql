-- duly's tables as schema 1 had them, written down for good: databases of the first version look
-- like this. Never edited; the next version that is released gets a file of its own.

create table duly_meta (name text primary key, value not null) without rowid;

create table duly_token (
    only_row integer primary key check (only_row = 1),
    value integer not null
);
insert or ignore into duly_token values (1, 0);

create table duly_clock (
    only_row integer primary key check (only_row = 1),
    boot_id text not null,
    offset_ms integer not null
);

create table duly_topics (
    topic_no integer primary key,
    name text not null unique,
    exactly_once integer not null,
    partitions integer not null,
    retention_s real not null,
    identity_retention_s real not null
);

create table duly_streams (
    stream integer primary key,
    topic_no integer not null,
    partition integer not null,
    next_seq integer not null,
    largest integer not null default 0,
    latest_due_ms integer not null default 0,
    unique (topic_no, partition)
);

create table duly_messages (
    position integer primary key,
    source text not null,
    id text not null,
    key text,
    time_ms integer not null,
    headers text,
    due_ms integer,
    body blob not null
);

create table duly_identities (
    topic_no integer not null,
    source text not null,
    id text not null,
    hash blob not null,
    position integer not null,
    time_ms integer not null,
    primary key (topic_no, source, id)
) without rowid;

create table duly_subscriptions (
    subscription_no integer primary key,
    name text not null,
    topic_no integer not null,
    guarantee text not null,
    order_by_key integer not null,
    hold_key_on_dead integer not null,
    unique (name, topic_no)
);

create table duly_cursors (
    subscription_no integer not null,
    stream integer not null,
    next_seq integer not null,
    primary key (subscription_no, stream)
) without rowid;

create table duly_claims (
    claim_id integer primary key,
    subscription_no integer not null,
    first integer not null,
    last integer not null,
    attempt integer not null,
    alone integer not null,
    repeated integer not null,
    replays integer not null default 0,
    token integer,
    worker text,
    lane integer,
    boot_id text,
    lease_until_boot_ms integer,
    mark integer
);

create index duly_claims_token on duly_claims (token, subscription_no, first);

create table duly_parked (
    subscription_no integer not null,
    position integer not null,
    key text,
    due_ms integer,
    attempt integer not null,
    alone integer not null,
    repeated integer not null,
    replays integer not null default 0,
    error text,
    primary key (subscription_no, position)
) without rowid;

create index duly_parked_due on duly_parked (subscription_no, due_ms);

create index duly_parked_key on duly_parked (subscription_no, key, position);

create table duly_dead (
    dead_id integer primary key autoincrement,
    subscription_no integer not null,
    position integer not null,
    topic text not null,
    source text,
    id text,
    key text,
    time_ms integer,
    headers text,
    due_ms integer,
    body blob,
    error text not null,
    attempts integer not null,
    dead_ms integer not null,
    replays integer not null default 0
);

create index duly_dead_key on duly_dead (subscription_no, key, position);

create table duly_incidents (
    incident_id integer primary key,
    time_ms integer not null,
    kind text not null,
    topic text,
    subscription text,
    source text,
    id text,
    position integer,
    count integer not null,
    worker text,
    detail text not null
);

create table duly_inbox_flows (
    flow_no integer primary key,
    consumer text not null,
    topic text not null,
    source text not null,
    unique (consumer, topic, source)
);

create table duly_inbox (
    flow_no integer not null,
    id text not null,
    hash integer not null,
    time_ms integer not null,
    mark integer not null,
    primary key (flow_no, id)
) without rowid;

create table duly_log_cursors (
    consumer text not null,
    log text not null,
    next_offset integer not null,
    epoch integer not null,
    primary key (consumer, log)
) without rowid;

create table duly_steering (
    name text primary key,
    paused integer not null default 0,
    under text,
    since_ms integer not null
) without rowid;

create table duly_epochs (
    name text not null,
    epoch text not null,
    time_ms integer not null,
    primary key (name, epoch)
) without rowid;

create table duly_erased (
    topic_no integer not null,
    hash blob not null,
    time_ms integer not null,
    primary key (topic_no, hash)
) without rowid;

create table duly_outbox (
    position integer primary key autoincrement,
    topic text not null,
    source text not null,
    id text not null,
    key text,
    time_ms integer not null,
    headers text,
    due_ms integer,
    body blob not null
);

create table duly_outbox_refused (
    position integer primary key,
    attempts integer not null,
    error text not null,
    due_ms integer
);

create table duly_outbox_relay (
    one integer primary key check (one = 1),
    relay text not null,
    worker text not null,
    boot_id text not null,
    until_boot_ms integer not null
);

create table duly_log_dead (
    dead_id integer primary key autoincrement,
    consumer text not null,
    log text not null,
    "offset" integer not null,
    epoch integer not null,
    topic text not null,
    source text not null,
    id text not null,
    key text,
    time_ms integer not null,
    headers text,
    due_ms integer,
    body blob not null,
    error text not null,
    attempts integer not null,
    dead_ms integer not null
);

create index duly_log_dead_by_offset on duly_log_dead (consumer, log, "offset");
