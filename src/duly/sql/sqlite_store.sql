-- Every statement of duly's store on SQLite: inbox, cursors, what is parked of logs, outbox, dead
-- letters of other brokers.


-- ===== tables =================================================================================

-- name: create_inbox_flows
-- Whose inbox, and of which events: the part of an identity that many messages share. The topic
-- belongs to it, as it does where an event is published.
create table if not exists duly_inbox_flows (
    flow_no integer primary key,
    consumer text not null,
    topic text not null,
    source text not null,
    unique (consumer, topic, source)
);

-- name: create_inbox
-- What has taken effect. mark: the transaction that admitted it; below 0: given up on instead,
-- so often.
create table if not exists duly_inbox (
    flow_no integer not null,
    id text not null,
    hash integer not null,
    time_ms integer not null,
    mark integer not null,
    primary key (flow_no, id)
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

-- name: create_outbox_refused
-- What the broker refused of the outbox. due_ms null: given up on, for a person to look at.
create table if not exists duly_outbox_refused (
    position integer primary key,
    attempts integer not null,
    error text not null,
    due_ms integer
);

-- name: create_outbox_relay
-- The one relay that works the outbox, until its lease ends or its process is dead.
create table if not exists duly_outbox_relay (
    one integer primary key check (one = 1),
    relay text not null,
    worker text not null,
    boot_id text not null,
    until_boot_ms integer not null
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

-- name: create_log_dead_by_offset
-- A delivery below the cursor may be of one that was given up on.
create index if not exists duly_log_dead_by_offset on duly_log_dead (consumer, log, "offset");

-- name: create_log_parked
-- Messages of logs that wait for a retry, whole, behind the cursor that has passed them. attempts:
-- starts that are charged. Taken: until_ms is not 0, by a clock (a machine's since it was booted)
-- that a lease of another one is over for. kind: 1 alone, its start is counted; 2 asked for singly.
create table if not exists duly_log_parked (
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

-- name: create_log_parked_by_time
create index if not exists duly_log_parked_by_time
on duly_log_parked (consumer, until_ms, again_ms);

-- name: create_letters
-- Dead letters of a broker that keeps none itself. identity: a hash of consumer, topic, source, id
-- and body, since a second writing of one changes nothing.
create table if not exists duly_letters (
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


-- ===== inbox ==================================================================================

-- name: inbox_flow
select flow_no from duly_inbox_flows where consumer = ? and topic = ? and source = ?;

-- name: add_inbox_flow
insert into duly_inbox_flows (consumer, topic, source) values (?, ?, ?) returning flow_no;

-- name: inbox_flow_after
select min(flow_no) from duly_inbox_flows where consumer = ? and flow_no > ?;

-- name: inbox_remember
insert into duly_inbox (flow_no, id, hash, time_ms, mark)
values (?1, ?, ?, ?2, ?3) on conflict do nothing;

-- name: inbox_known
select hash, mark from duly_inbox where flow_no = ? and id = ?;

-- name: inbox_forget
delete from duly_inbox where flow_no = ? and id = ? and mark = ?;

-- name: inbox_mark
update duly_inbox set mark = ? where flow_no = ? and id = ? and mark = ?;

-- name: inbox_stretch
-- The next so many: the last of them, the oldest, and how many there are.
select max(id), min(time_ms), count(*) from (
    select id, time_ms from duly_inbox where flow_no = ? and id > ? order by id limit ?
) s;

-- name: inbox_forget_old
delete from duly_inbox where flow_no = ? and id > ? and id <= ? and time_ms < ?;


-- ===== cursors ================================================================================

-- name: log_cursor
select next_offset, epoch from duly_log_cursors where consumer = ? and log = ?;

-- name: open_log_cursor
insert into duly_log_cursors (consumer, log, next_offset, epoch) values (?, ?, ?, ?)
on conflict (consumer, log) do update set log = excluded.log returning next_offset, epoch;

-- name: move_log_cursor
-- Compare and set: somebody who moved it since it was read makes this change nothing.
update duly_log_cursors set next_offset = ?, epoch = ?
where consumer = ? and log = ? and next_offset = ? and epoch = ? returning 1;

-- name: bury_of_log
insert into duly_log_dead (
    consumer, log, "offset", epoch, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms
) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: is_dead_of_log
select 1 from duly_log_dead where consumer = ? and log = ? and "offset" = ? limit 1;

-- name: dead_of_logs
select dead_id, consumer, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms
from duly_log_dead where ?1 is null or consumer = ?1 order by dead_id desc limit ?2;


-- ===== parked of logs =========================================================================

-- name: log_park
insert into duly_log_parked (
    consumer, log, "offset", epoch, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, replays, repeated, noted_ms, again_ms
) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: log_parked_due
-- Of a consumer (?1) and some topics (?2): what is due at ?3 and nobody has, or whose lease is over
-- at ?4 of the clock ?5.
select parked_id, token, attempts, suspect, kind, repeated, until_ms, length(body)
from duly_log_parked where parked_id in (
    select parked_id from (
        select parked_id from duly_log_parked
        where consumer = ?1 and until_ms = 0 and again_ms <= ?3
        and topic in (select value from json_each(?2)) order by again_ms, parked_id limit ?6
    )
    union all
    select parked_id from (
        select parked_id from duly_log_parked
        where consumer = ?1 and until_ms > 0 and (clock <> ?5 or until_ms <= ?4)
        and topic in (select value from json_each(?2)) limit ?6
    )
)
order by again_ms, parked_id;

-- name: log_parked_follow_clock
-- What was noted later than now was so by a clock that was set back, or by another one that is
-- ahead: it waits from now for as long as it had to wait then.
update duly_log_parked set again_ms = again_ms - noted_ms + ?3, noted_ms = ?3
where consumer = ?1 and until_ms = 0 and noted_ms > ?3
and topic in (select value from json_each(?2));

-- name: log_parked_take
update duly_log_parked set
    token = token + 1, attempts = ?, suspect = ?, kind = ?, repeated = ?,
    until_ms = ? + ?, clock = ?
where parked_id = ?;

-- name: log_parked_message
select log, "offset", epoch, replays, topic, source, id, key, time_ms, headers, due_ms, body
from duly_log_parked where parked_id = ?;

-- name: log_parked_next
-- In how many milliseconds the first of those that nobody has is due, and the first lease is over.
-- Where the clock was set back since the first was noted: now, so that somebody sees to it.
select
    (
        select case when noted_ms > ?3 then 0 else again_ms - ?3 end from duly_log_parked
        where consumer = ?1 and until_ms = 0 and topic in (select value from json_each(?2))
        order by again_ms limit 1
    ),
    (
        select min(case when clock <> ?5 then 0 else until_ms - ?4 end) from duly_log_parked
        where consumer = ?1 and until_ms > 0 and topic in (select value from json_each(?2))
    );

-- name: log_parked_fence
-- Whoever took it last has this token.
update duly_log_parked set kind = kind where parked_id = ? and token = ?;

-- name: log_parked_is_held
select parked_id from duly_log_parked where parked_id = ? and token = ?;

-- name: log_parked_extend
update duly_log_parked set until_ms = ? + ?, clock = ? where parked_id = ? and token = ?;

-- name: log_parked_again
update duly_log_parked set
    error = ?, attempts = ?, repeated = ?, suspect = ?, noted_ms = ?, again_ms = ?,
    token = token + 1, kind = 0, until_ms = 0, clock = ''
where parked_id = ? and token = ?;

-- name: log_parked_give_back
update duly_log_parked set
    attempts = attempts - (kind = 1), repeated = max(repeated, ?),
    token = token + 1, kind = 0, until_ms = 0, clock = ''
where parked_id = ? and token = ?;

-- name: log_parked_end
delete from duly_log_parked where parked_id = ? and token = ?;

-- name: log_parked_count
select consumer, topic, sum(until_ms = 0), sum(until_ms > 0), min(time_ms)
from duly_log_parked group by consumer, topic order by consumer, topic;

-- name: log_dead_forget
delete from duly_log_dead where consumer = ? and topic = ? and source = ? and id = ?;


-- ===== dead letters ===========================================================================

-- name: keep_letters
insert into duly_letters (
    identity, consumer, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms, replays
) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
on conflict (identity) do update set
    error = excluded.error, attempts = excluded.attempts, dead_ms = excluded.dead_ms,
    replays = excluded.replays
where excluded.replays > duly_letters.replays;

-- name: letters
select consumer, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms, letter_id, replays
from duly_letters
where (?1 is null or consumer = ?1) and (?2 is null or topic = ?2) and (?3 is null or id = ?3)
and (?4 is null or instr(error, ?4)) and (?5 is null or dead_ms >= ?5)
and (?6 is null or dead_ms < ?6) and (?7 is null or letter_id < ?7)
order by letter_id desc limit ?8;

-- name: letter_is_kept
select 1 from duly_letters where letter_id = ? and replays = ?;

-- name: remove_letters
delete from duly_letters where letter_id = ? and replays = ?;

-- name: count_letters
select consumer, topic, count(*) from duly_letters group by consumer, topic order by consumer, topic;


-- ===== outbox =================================================================================

-- name: outbox_put
insert into duly_outbox (topic, source, id, key, time_ms, headers, due_ms, body)
values (?, ?, ?, ?, ?, ?, ?, ?);

-- name: outbox_first
select position, topic, source, id, key, time_ms, headers, due_ms, body
from duly_outbox order by position limit ?;

-- name: outbox_sent
delete from duly_outbox where position = ?;

-- name: outbox_unsent
-- The oldest that are to be sent now (?1), as many as fit (?2 messages, ?3 bytes) and at least
-- one. What is behind a waiting one with its topic and key waits too.
with ready as (
    select o.position, length(o.body) as size, coalesce(r.attempts, 0) as attempts
    from duly_outbox o left join duly_outbox_refused r on r.position = o.position
    where (r.position is null or r.due_ms <= ?1)
    and (o.key is null or not exists (
        select 1 from duly_outbox_refused w join duly_outbox e on e.position = w.position
        where w.due_ms > ?1 and w.position < o.position and e.topic = o.topic and e.key = o.key
    ))
    order by o.position limit ?2
), measured as (
    select position, size, attempts, sum(size) over (order by position) as total from ready
)
select m.position, m.attempts,
    o.topic, o.source, o.id, o.key, o.time_ms, o.headers, o.due_ms, o.body
from measured m join duly_outbox o on o.position = m.position
where m.total <= ?3 or m.position = (select min(position) from ready)
order by m.position;

-- name: outbox_left
select o.position, coalesce(r.attempts, 0),
    o.topic, o.source, o.id, o.key, o.time_ms, o.headers, o.due_ms, o.body
from duly_outbox o left join duly_outbox_refused r on r.position = o.position
where o.position = ?;

-- name: outbox_next_due
select min(due_ms) from duly_outbox_refused where due_ms > ?;

-- name: outbox_sent_refused
delete from duly_outbox_refused where position = ?;

-- name: outbox_refused
insert into duly_outbox_refused (position, attempts, error, due_ms)
select position, ?2, ?3, ?4 from duly_outbox where position = ?1
on conflict do update set
    attempts = attempts + excluded.attempts, error = excluded.error, due_ms = excluded.due_ms;

-- name: outbox_given_up
select o.position, r.attempts, r.error,
    o.topic, o.source, o.id, o.key, o.time_ms, o.headers, o.due_ms, o.body
from duly_outbox_refused r join duly_outbox o on o.position = r.position
where r.due_ms is null order by o.position limit ?;

-- name: outbox_try_again
delete from duly_outbox_refused where position = ? and due_ms is null;

-- name: outbox_backlog
select
    (select count(*) from duly_outbox) - (
        select count(*) from duly_outbox_refused where due_ms is null
    ),
    (select count(*) from duly_outbox_refused where due_ms is null),
    (
        select o.time_ms from duly_outbox o
        left join duly_outbox_refused r on r.position = o.position
        where r.position is null or r.due_ms is not null order by o.position limit 1
    );

-- name: outbox_holder
select relay, worker, boot_id, until_boot_ms from duly_outbox_relay;

-- name: outbox_hold
-- Only if the holder is still the one that was found (?5), or there is none.
insert into duly_outbox_relay (one, relay, worker, boot_id, until_boot_ms)
values (1, ?1, ?2, ?3, ?4)
on conflict do update set relay = ?1, worker = ?2, boot_id = ?3, until_boot_ms = ?4
where duly_outbox_relay.relay in (?1, ?5)
returning relay;

-- name: outbox_let_go
delete from duly_outbox_relay where relay = ?;


-- ===== what people ask ========================================================================

-- name: inbox_forget_some
delete from duly_inbox where (flow_no, id) in (
    select i.flow_no, i.id from duly_inbox_flows f join duly_inbox i on i.flow_no = f.flow_no
    where f.consumer = ? limit ?
);

-- name: inbox_effect
select i.time_ms from duly_inbox_flows f join duly_inbox i on i.flow_no = f.flow_no
where f.consumer = ? and f.topic = ? and f.source = ? and i.id = ? and i.mark >= 0;

-- name: outbox_of_person
select o.position, length(o.body) from duly_outbox o
where (?1 is null or o.key = ?1) and (?2 is null or o.id = ?2)
and (?3 is null or o.source = ?3) and (?4 is null or o.topic = ?4) limit ?5;

-- name: outbox_erase
delete from duly_outbox where position = ?;

-- name: log_parked_of_person
select p.parked_id, length(p.body) from duly_log_parked p
where (?1 is null or p.key = ?1) and (?2 is null or p.id = ?2)
and (?3 is null or p.source = ?3) and (?4 is null or p.topic = ?4) limit ?5;

-- name: log_parked_erase
delete from duly_log_parked where parked_id = ?;

-- name: log_dead_of_person
select d.dead_id, length(d.body) from duly_log_dead d
where (?1 is null or d.key = ?1) and (?2 is null or d.id = ?2)
and (?3 is null or d.source = ?3) and (?4 is null or d.topic = ?4) limit ?5;

-- name: log_dead_erase
delete from duly_log_dead where dead_id = ?;

-- name: letters_of_person
select l.letter_id, length(l.body) from duly_letters l
where (?1 is null or l.key = ?1) and (?2 is null or l.id = ?2)
and (?3 is null or l.source = ?3) and (?4 is null or l.topic = ?4) limit ?5;

-- name: letters_erase
delete from duly_letters where letter_id = ?;
