-- How a log of an older schema on PostgreSQL becomes one of this: one block a version, in order, all
-- that are missing in one transaction. A new log is not made by these: postgres.sql says how the
-- tables are now, and a test compares the two.
--
-- `-- oldest: N` names the oldest schema of code that may go on using the log afterwards; see
-- sqlite_migrations.sql. Released blocks are never edited.


-- name: migration_2
-- oldest: 2
-- Subscriptions can be held back, messages erased, and schedules kept. Code that knows nothing of
-- it would claim from what is paused, and store again what was erased.
create table duly.steering (
    name text primary key,
    paused boolean not null default false,
    under text,
    since_ms bigint not null
);

create table duly.epochs (
    name text not null,
    epoch text not null,
    time_ms bigint not null,
    primary key (name, epoch)
);

create table duly.erased (
    topic_no bigint not null,
    hash bytea not null,
    time_ms bigint not null,
    primary key (topic_no, hash)
);

create table duly.schedules (
    name text primary key,
    tick_ms bigint not null
);

create table duly.attendance (
    number bigint primary key,
    name text not null
);

create view duly.reached as
select subscription_no, stream, max(next_seq) as next_seq
from duly.cursors group by subscription_no, stream;

create view duly.located as
select m.place, l.position + m.place - l.place as position, l.stream, m.time_ms, m.due_ms,
    m.source, m.id, m.key, m.headers, m.body
from duly.messages m join (
    select place, count, position, position >> 40 as stream from duly.runs
    union all
    select place, count, null, stream from duly.arrivals
) l on (l.place >> 16) = (m.place >> 16) and m.place >= l.place and m.place < l.place + l.count;

create function duly.identity_hash(topic text, source text, id text) returns bytea
language sql immutable as $$
    select sha256(
        convert_to(topic, 'UTF8') || '\x00'::bytea || convert_to(source, 'UTF8')
        || '\x00'::bytea || convert_to(id, 'UTF8')
    )
$$;


-- name: migration_3
-- oldest: 2
-- Nothing of a log changes.
select 1;


-- name: migration_4
-- oldest: 2
-- Nothing of a log changes.
select 1;


-- name: migration_5
-- oldest: 2
-- Nothing of a log changes.
select 1;
