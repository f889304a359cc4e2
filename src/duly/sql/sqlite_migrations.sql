-- How a database of an older schema becomes one of this: one block a version, in order, all that
-- are missing in one transaction. A new database is not made by these: sqlite.sql and
-- sqlite_store.sql say how the tables are now, and a test compares the two.
--
-- `-- oldest: N` names the oldest schema of code that may go on using the database afterwards.
-- What only adds (a table, an index, a column that has a default) keeps the version before it
-- running; what takes away or changes a meaning names its own number. Released blocks are never
-- edited.


-- name: migration_2
-- oldest: 1
-- Schedules remember up to which tick they have published.
create table duly_schedules (
    name text primary key,
    tick_ms integer not null
) without rowid;


-- name: migration_3
-- oldest: 1
-- A store keeps dead letters of brokers that keep none.
create table duly_letters (
    letter_id integer primary key autoincrement,
    identity blob not null unique,
    consumer text not null,
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
    dead_ms integer not null,
    replays integer not null
);


-- name: migration_4
-- oldest: 1
-- A store keeps messages of logs that wait for a retry.
create table duly_log_parked (
    parked_id integer primary key autoincrement,
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
    replays integer not null,
    repeated integer not null,
    noted_ms integer not null,
    again_ms integer not null,
    suspect integer not null default 0,
    kind integer not null default 0,
    token integer not null default 0,
    until_ms integer not null default 0,
    clock text not null default ''
);
create index duly_log_parked_by_time
on duly_log_parked (consumer, until_ms, again_ms);


-- name: migration_5
-- oldest: 1
-- Tokens are times, and the claim of one range is in no index. Code that gives them out by
-- duly_token goes on beside this; without its index it looks through the claims, which are few.
drop index duly_claims_token;
create index duly_claims_free on duly_claims (subscription_no, first) where token is null;
create index duly_claims_further on duly_claims (token, first) where claim_id <> token;
