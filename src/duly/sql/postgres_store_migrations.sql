-- The same for what a store has in its database, which may be in another one than any log.


-- name: migration_2
-- oldest: 1
-- Nothing of a store's changes.
select 1;


-- name: migration_3
-- oldest: 1
-- A store keeps dead letters of brokers that keep none.
create table duly.letters (
    letter_id bigint generated always as identity primary key,
    identity bytea not null unique,
    consumer text not null,
    topic text not null,
    source text not null,
    id text not null,
    key text,
    time_ms bigint not null,
    headers text,
    due_ms bigint,
    body bytea not null,
    error text not null,
    attempts integer not null,
    dead_ms bigint not null,
    replays integer not null
);


-- name: migration_4
-- oldest: 1
-- A store keeps messages of logs that wait for a retry.
create table duly.log_parked (
    parked_id bigint generated always as identity primary key,
    consumer text not null,
    log text not null,
    "offset" bigint not null,
    epoch bigint not null,
    topic text not null,
    source text not null,
    id text not null,
    key text,
    time_ms bigint not null,
    headers text,
    due_ms bigint,
    error text not null,
    attempts bigint not null,
    replays bigint not null,
    repeated bigint not null,
    noted_ms bigint not null,
    again_ms bigint not null,
    suspect bigint not null default 0,
    kind bigint not null default 0,
    token bigint not null default 0,
    until_ms bigint not null default 0,
    clock text not null default '',
    body bytea not null
) with (fillfactor = 50);
create index log_parked_by_time on duly.log_parked (consumer, until_ms, again_ms);


-- name: migration_5
-- oldest: 1
-- Nothing of a store's changes.
select 1;
