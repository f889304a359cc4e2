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
