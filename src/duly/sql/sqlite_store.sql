-- Every statement of duly's store on SQLite: inbox, cursors, outbox, dead letters of logs.


-- ===== tables =================================================================================

-- name: create_inbox
-- What has taken effect. The topic belongs to the identity, as it does where it is published.
-- mark: the transaction that admitted it.
create table if not exists duly_inbox (
    consumer text not null,
    topic text not null,
    source text not null,
    id text not null,
    hash blob not null,
    time_ms integer not null,
    mark integer not null,
    primary key (consumer, topic, source, id)
) without rowid;

-- name: create_log_cursors
-- Everything of the log before next_offset has taken effect; epoch is that of the last of it.
create table if not exists duly_log_cursors (
    consumer text not null,
    log text not null,
    next_offset integer not null,
    epoch integer not null,
    primary key (consumer, log)
) without rowid;

-- name: create_outbox
create table if not exists duly_outbox (
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

-- name: create_log_dead
-- Messages of logs that a consumer gave up on: a log itself keeps no dead letters.
create table if not exists duly_log_dead (
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


-- ===== inbox ==================================================================================

-- name: inbox_remember
insert into duly_inbox (consumer, topic, source, id, hash, time_ms, mark)
values (?, ?, ?, ?, ?, ?, ?) on conflict do nothing;

-- name: inbox_known
select hash, mark from duly_inbox where consumer = ? and topic = ? and source = ? and id = ?;

-- name: inbox_forget
delete from duly_inbox
where consumer = ? and topic = ? and source = ? and id = ? and mark = ?;

-- name: inbox_after
-- The end of the next stretch to look at.
select topic, source, id from duly_inbox
where consumer = ? and (topic, source, id) > (?, ?, ?)
order by topic, source, id limit 1 offset ?;

-- name: inbox_forget_old
delete from duly_inbox
where consumer = ?1 and (topic, source, id) > (?2, ?3, ?4) and (topic, source, id) <= (?5, ?6, ?7)
and time_ms < ?8;

-- name: inbox_forget_old_rest
delete from duly_inbox where consumer = ?1 and (topic, source, id) > (?2, ?3, ?4) and time_ms < ?5;


-- ===== cursors ================================================================================

-- name: log_cursor
select next_offset, epoch from duly_log_cursors where consumer = ? and log = ?;

-- name: add_log_cursor
insert into duly_log_cursors (consumer, log, next_offset, epoch) values (?, ?, ?, ?)
on conflict do nothing returning 1;

-- name: move_log_cursor
-- Compare and set: somebody who moved it since it was read makes this change nothing.
update duly_log_cursors set next_offset = ?, epoch = ?
where consumer = ? and log = ? and next_offset = ? and epoch = ? returning 1;

-- name: bury_of_log
insert into duly_log_dead (
    consumer, log, "offset", epoch, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms
) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: dead_of_logs
select dead_id, consumer, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms
from duly_log_dead where ?1 is null or consumer = ?1 order by dead_id desc limit ?2;


-- ===== outbox =================================================================================

-- name: outbox_put
insert into duly_outbox (topic, source, id, key, time_ms, headers, due_ms, body)
values (?, ?, ?, ?, ?, ?, ?, ?);

-- name: outbox_first
select position, topic, source, id, key, time_ms, headers, due_ms, body
from duly_outbox order by position limit ?;

-- name: outbox_sent
delete from duly_outbox where position = ?;
