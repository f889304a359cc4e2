-- Every statement of duly's store on PostgreSQL: inbox, cursors, what is parked of logs, outbox,
-- dead letters of other brokers.
-- A statement for many rows takes them as columns behind the parameters that all share.


-- ===== tables =================================================================================

-- name: create_inbox_flows
-- Whose inbox, and of which events: the part of an identity that many messages share. The topic
-- belongs to it, as it does where an event is published.
create table if not exists duly.inbox_flows (
    flow_no bigint generated always as identity primary key,
    consumer text not null,
    topic text not null,
    source text not null,
    unique (consumer, topic, source)
);

-- name: create_inbox
-- What has taken effect. mark: the transaction that admitted it; below 0: given up on instead,
-- so often. Ids by their bytes: a collation costs more and may change under an index.
create table if not exists duly.inbox (
    flow_no bigint not null,
    id text collate "C" not null,
    hash bigint not null,
    time_ms bigint not null,
    mark bigint not null,
    primary key (flow_no, id)
);

-- name: create_log_cursors
-- Everything of the log before next_offset has taken effect; epoch is that of the last of it.
-- Half empty pages: each move then stays on its page and adds nothing to the index.
create table if not exists duly.log_cursors (
    consumer text not null,
    log text not null,
    next_offset bigint not null,
    epoch bigint not null,
    primary key (consumer, log)
) with (fillfactor = 50);

-- name: create_outbox
-- The columns that a relay looks at come before the body, which may be stored apart.
create table if not exists duly.outbox (
    position bigint generated always as identity primary key,
    topic text not null,
    source text not null,
    id text not null,
    key text,
    time_ms bigint not null,
    headers text,
    due_ms bigint,
    body bytea not null
);

-- name: create_outbox_refused
-- What the broker refused of the outbox. due_ms null: given up on, for a person to look at.
create table if not exists duly.outbox_refused (
    position bigint primary key,
    attempts integer not null,
    error text not null,
    due_ms bigint
);

-- name: create_outbox_relay
-- The one relay that works the outbox, until its lease ends.
create table if not exists duly.outbox_relay (
    one boolean primary key check (one),
    relay text not null,
    until_ms bigint not null
) with (fillfactor = 50);

-- name: create_log_dead
-- Messages of logs that a consumer gave up on: a log itself keeps no dead letters.
create table if not exists duly.log_dead (
    dead_id bigint generated always as identity primary key,
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
    body bytea not null,
    error text not null,
    attempts integer not null,
    dead_ms bigint not null
);

-- name: create_log_dead_by_offset
-- A delivery below the cursor may be of one that was given up on.
create index if not exists log_dead_by_offset on duly.log_dead (consumer, log, "offset");

-- name: create_log_parked
-- Messages of logs that wait for a retry, whole, behind the cursor that has passed them. attempts:
-- starts that are charged. Taken: until_ms is not 0, by this database's clock. kind: 1 alone, its
-- start is counted; 2 asked for singly. Half empty pages, as of the cursors.
create table if not exists duly.log_parked (
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

-- name: create_log_parked_by_time
create index if not exists log_parked_by_time on duly.log_parked (consumer, until_ms, again_ms);

-- name: create_letters
-- Dead letters of a broker that keeps none itself. identity: a hash of consumer, topic, source, id
-- and body, since a second writing of one changes nothing.
create table if not exists duly.letters (
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


-- ===== inbox ==================================================================================

-- name: inbox_flow
select flow_no from duly.inbox_flows where consumer = $1 and topic = $2 and source = $3;

-- name: add_inbox_flow
-- Another transaction may be adding it: this waits for that one, and gives its number.
insert into duly.inbox_flows (consumer, topic, source) values ($1, $2, $3)
on conflict (consumer, topic, source) do update set source = excluded.source
returning flow_no;

-- name: inbox_flow_after
select min(flow_no) from duly.inbox_flows where consumer = $1 and flow_no > $2;

-- name: inbox_remember
-- What another transaction is just adding is waited for: a second copy does not run beside it.
insert into duly.inbox (flow_no, id, hash, time_ms, mark)
select $1, e.id, e.hash, $2, $3 from unnest($4::text[], $5::bigint[]) as e(id, hash)
on conflict do nothing;

-- name: inbox_known
-- A row for each, in order; of nulls where nothing is remembered.
select i.hash, i.mark
from unnest($1::bigint[], $2::text[]) with ordinality as k(flow_no, id, n)
left join duly.inbox i on i.flow_no = k.flow_no and i.id = k.id
order by k.n;

-- name: inbox_forget
delete from duly.inbox i using unnest($1::bigint[], $2::text[], $3::bigint[]) as k(flow_no, id, mark)
where i.flow_no = k.flow_no and i.id = k.id and i.mark = k.mark;

-- name: inbox_mark
update duly.inbox i set mark = k.new_mark
from unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[]) as k(new_mark, flow_no, id, mark)
where i.flow_no = k.flow_no and i.id = k.id and i.mark = k.mark;

-- name: inbox_stretch
-- The next so many: the last of them, the oldest, and how many there are.
select max(id), min(time_ms), count(*) from (
    select id, time_ms from duly.inbox where flow_no = $1 and id > $2 order by id limit $3
) s;

-- name: inbox_forget_old
delete from duly.inbox where flow_no = $1 and id > $2 and id <= $3 and time_ms < $4;


-- ===== cursors ================================================================================

-- name: log_cursor
-- Locked: a second copy waits here for the first.
select next_offset, epoch from duly.log_cursors where consumer = $1 and log = $2 for update;

-- name: open_log_cursor
-- Another transaction may be opening it: this waits for that one.
insert into duly.log_cursors (consumer, log, next_offset, epoch) values ($1, $2, $3, $4)
on conflict (consumer, log) do update set log = excluded.log returning next_offset, epoch;

-- name: move_log_cursor
-- Compare and set: somebody who moved it since it was read makes this change nothing.
update duly.log_cursors set next_offset = $1, epoch = $2
where consumer = $3 and log = $4 and next_offset = $5 and epoch = $6 returning 1;

-- name: bury_of_log
insert into duly.log_dead (
    consumer, log, "offset", epoch, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms
)
select * from unnest(
    $1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[],
    $8::text[], $9::bigint[], $10::text[], $11::bigint[], $12::bytea[],
    $13::text[], $14::integer[], $15::bigint[]
);

-- name: is_dead_of_log
select 1 from duly.log_dead where consumer = $1 and log = $2 and "offset" = $3 limit 1;

-- name: dead_of_logs
select dead_id, consumer, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms
from duly.log_dead where $1::text is null or consumer = $1 order by dead_id desc limit $2;


-- ===== parked of logs =========================================================================

-- name: log_park
insert into duly.log_parked (
    consumer, log, "offset", epoch, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, replays, repeated, noted_ms, again_ms
)
select * from unnest(
    $1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[],
    $8::text[], $9::bigint[], $10::text[], $11::bigint[], $12::bytea[], $13::text[],
    $14::bigint[], $15::bigint[], $16::bigint[], $17::bigint[], $18::bigint[]
);

-- name: log_parked_due
-- Of a consumer ($1) and some topics ($2): what is due at $3 and nobody has, or whose lease is over
-- at $4 of the clock $5. What others look at in this moment is theirs, and so is what a
-- transaction that is open has fenced, whose lease may be over.
with at as (
    select coalesce($4::bigint, (extract(epoch from clock_timestamp()) * 1000)::bigint) as now_ms
), due as (
    (
        select parked_id from duly.log_parked
        where consumer = $1::text and until_ms = 0 and again_ms <= $3::bigint
        and topic in (select json_array_elements_text($2::json))
        order by again_ms, parked_id limit $6::bigint
    )
    union all
    (
        select parked_id from duly.log_parked where consumer = $1::text and until_ms > 0
        and (clock <> $5::text or until_ms <= (select now_ms from at))
        and topic in (select json_array_elements_text($2::json)) limit $6::bigint
    )
)
select p.parked_id, p.token, p.attempts, p.suspect, p.kind, p.repeated, p.until_ms,
    octet_length(p.body)
from due join duly.log_parked p on p.parked_id = due.parked_id
where p.again_ms <= $3::bigint
and (p.until_ms = 0 or p.clock <> $5::text or p.until_ms <= (select now_ms from at))
order by p.again_ms, p.parked_id for update of p skip locked;

-- name: log_parked_follow_clock
-- What was noted later than now was so by a clock that was set back, or by another one that is
-- ahead: it waits from now for as long as it had to wait then.
update duly.log_parked set again_ms = again_ms - noted_ms + $3::bigint, noted_ms = $3::bigint
where parked_id in (
    select parked_id from duly.log_parked
    where consumer = $1::text and until_ms = 0 and noted_ms > $3::bigint
    and topic in (select json_array_elements_text($2::json)) for update skip locked
);

-- name: log_parked_take
update duly.log_parked p set
    token = p.token + 1, attempts = k.attempts, suspect = k.suspect, kind = k.kind,
    repeated = k.repeated, clock = k.clock,
    until_ms = k.lease_ms
        + coalesce(k.now_ms, (extract(epoch from clock_timestamp()) * 1000)::bigint)
from unnest(
    $1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[],
    $7::text[], $8::bigint[]
) as k(attempts, suspect, kind, repeated, now_ms, lease_ms, clock, parked_id)
where p.parked_id = k.parked_id;

-- name: log_parked_message
-- A row for each, in order; of nulls where it is not there.
select p.log, p."offset", p.epoch, p.replays, p.topic, p.source, p.id, p.key, p.time_ms, p.headers,
    p.due_ms, p.body
from unnest($1::bigint[]) with ordinality as k(parked_id, n)
left join duly.log_parked p on p.parked_id = k.parked_id order by k.n;

-- name: log_parked_next
-- In how many milliseconds the first of those that nobody has is due, and the first lease is over.
-- Where the clock was set back since the first was noted: now, so that somebody sees to it.
with at as (
    select coalesce($4::bigint, (extract(epoch from clock_timestamp()) * 1000)::bigint) as now_ms
)
select
    (
        select case when noted_ms > $3::bigint then 0 else again_ms - $3::bigint end
        from duly.log_parked where consumer = $1::text and until_ms = 0
        and topic in (select json_array_elements_text($2::json)) order by again_ms limit 1
    ),
    (
        select min(case when p.clock <> $5::text then 0 else p.until_ms - at.now_ms end)
        from duly.log_parked p, at where p.consumer = $1::text and p.until_ms > 0
        and p.topic in (select json_array_elements_text($2::json))
    );

-- name: log_parked_fence
-- Whoever took it last has this token. Locked: who takes it, or gives it back, comes after this.
update duly.log_parked p set kind = p.kind
from unnest($1::bigint[], $2::bigint[]) as k(parked_id, token)
where p.parked_id = k.parked_id and p.token = k.token;

-- name: log_parked_is_held
-- A row for each, in order; of nulls where it is not.
select p.parked_id
from unnest($1::bigint[], $2::bigint[]) with ordinality as k(parked_id, token, n)
left join duly.log_parked p on p.parked_id = k.parked_id and p.token = k.token order by k.n;

-- name: log_parked_extend
-- What a transaction has fenced nobody takes: it is not waited for.
update duly.log_parked p set until_ms = k.until_ms, clock = k.clock
from (
    select p.parked_id, k.clock, k.lease_ms
        + coalesce(k.now_ms, (extract(epoch from clock_timestamp()) * 1000)::bigint) as until_ms
    from unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[], $5::bigint[])
        as k(now_ms, lease_ms, clock, parked_id, token)
    join duly.log_parked p on p.parked_id = k.parked_id and p.token = k.token
    for update of p skip locked
) as k
where p.parked_id = k.parked_id;

-- name: log_parked_again
update duly.log_parked p set
    error = k.error, attempts = k.attempts, repeated = k.repeated, suspect = k.suspect,
    noted_ms = k.noted_ms, again_ms = k.again_ms, token = p.token + 1, kind = 0, until_ms = 0,
    clock = ''
from unnest(
    $1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
    $8::bigint[]
) as k(error, attempts, repeated, suspect, noted_ms, again_ms, parked_id, token)
where p.parked_id = k.parked_id and p.token = k.token;

-- name: log_parked_give_back
update duly.log_parked p set
    attempts = p.attempts - (p.kind = 1)::int, repeated = greatest(p.repeated, k.repeated),
    token = p.token + 1, kind = 0, until_ms = 0, clock = ''
from unnest($1::bigint[], $2::bigint[], $3::bigint[]) as k(repeated, parked_id, token)
where p.parked_id = k.parked_id and p.token = k.token;

-- name: log_parked_end
delete from duly.log_parked p using unnest($1::bigint[], $2::bigint[]) as k(parked_id, token)
where p.parked_id = k.parked_id and p.token = k.token;

-- name: log_parked_count
select consumer, topic, count(*) filter (where until_ms = 0), count(*) filter (where until_ms > 0),
    min(time_ms)
from duly.log_parked group by consumer, topic order by consumer, topic;

-- name: log_dead_forget
delete from duly.log_dead d
using unnest($1::text[], $2::text[], $3::text[], $4::text[]) as k(consumer, topic, source, id)
where d.consumer = k.consumer and d.topic = k.topic and d.source = k.source and d.id = k.id;


-- ===== dead letters ===========================================================================

-- name: keep_letters
insert into duly.letters as kept (
    identity, consumer, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms, replays
)
select * from unnest(
    $1::bytea[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bigint[],
    $8::text[], $9::bigint[], $10::bytea[], $11::text[], $12::bigint[], $13::bigint[], $14::bigint[]
)
on conflict (identity) do update set
    error = excluded.error, attempts = excluded.attempts, dead_ms = excluded.dead_ms,
    replays = excluded.replays
where excluded.replays > kept.replays;

-- name: letters
select consumer, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms, letter_id, replays
from duly.letters
where ($1::text is null or consumer = $1::text) and ($2::text is null or topic = $2::text)
and ($3::text is null or id = $3::text) and ($4::text is null or strpos(error, $4::text) > 0)
and ($5::bigint is null or dead_ms >= $5::bigint)
and ($6::bigint is null or dead_ms < $6::bigint)
and ($7::bigint is null or letter_id < $7::bigint)
order by letter_id desc limit $8::bigint;

-- name: letter_is_kept
-- A row for each, in order; of nulls where it is not.
select l.letter_id
from unnest($1::bigint[], $2::bigint[]) with ordinality as k(letter_id, replays, n)
left join duly.letters l on l.letter_id = k.letter_id and l.replays = k.replays
order by k.n;

-- name: remove_letters
delete from duly.letters l using unnest($1::bigint[], $2::bigint[]) as k(letter_id, replays)
where l.letter_id = k.letter_id and l.replays = k.replays;

-- name: count_letters
select consumer, topic, count(*) from duly.letters group by consumer, topic order by consumer, topic;


-- ===== outbox =================================================================================

-- name: outbox_put
-- In their order: positions are given out as rows come.
insert into duly.outbox (topic, source, id, key, time_ms, headers, due_ms, body)
select m.topic, m.source, m.id, m.key, m.time_ms, m.headers, m.due_ms, m.body
from unnest(
    $1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::bigint[],
    $8::bytea[]
) with ordinality as m(topic, source, id, key, time_ms, headers, due_ms, body, n)
order by m.n;

-- name: outbox_first
select position, topic, source, id, key, time_ms, headers, due_ms, body
from duly.outbox order by position limit $1;

-- name: outbox_sent
delete from duly.outbox o using unnest($1::bigint[]) as s(position) where o.position = s.position;

-- name: outbox_unsent
-- The oldest that are to be sent now ($1), as many as fit ($2 messages, $3 bytes) and at least
-- one. What is behind a waiting one with its topic and key waits too.
with waiting as materialized (
    select e.position, e.topic, e.key
    from duly.outbox_refused w join duly.outbox e on e.position = w.position
    where w.due_ms > $1 and e.key is not null
), ready as (
    select o.position, octet_length(o.body) as size, coalesce(r.attempts, 0) as attempts,
        o.topic, o.source, o.id, o.key, o.time_ms, o.headers, o.due_ms, o.body
    from duly.outbox o left join duly.outbox_refused r on r.position = o.position
    where (r.position is null or r.due_ms <= $1)
    and (o.key is null or not exists (
        select 1 from waiting w
        where w.position < o.position and w.topic = o.topic and w.key = o.key
    ))
    order by o.position limit $2
), measured as (
    select *, sum(size) over (order by position) as total from ready
)
select position, attempts, topic, source, id, key, time_ms, headers, due_ms, body
from measured
where total <= $3 or position = (select min(position) from ready)
order by position;

-- name: outbox_left
-- One row for each position, of nulls where there is no message.
select o.position, coalesce(r.attempts, 0),
    o.topic, o.source, o.id, o.key, o.time_ms, o.headers, o.due_ms, o.body
from unnest($1::bigint[]) with ordinality as k(position, n)
left join duly.outbox o on o.position = k.position
left join duly.outbox_refused r on r.position = o.position
order by k.n;

-- name: outbox_next_due
select min(due_ms) from duly.outbox_refused where due_ms > $1;

-- name: outbox_sent_refused
delete from duly.outbox_refused r using unnest($1::bigint[]) as s(position)
where r.position = s.position;

-- name: outbox_refused
insert into duly.outbox_refused (position, attempts, error, due_ms)
select o.position, w.attempts, w.error, w.due_ms
from unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[])
    as w(position, attempts, error, due_ms)
join duly.outbox o on o.position = w.position
on conflict (position) do update set
    attempts = outbox_refused.attempts + excluded.attempts,
    error = excluded.error, due_ms = excluded.due_ms;

-- name: outbox_given_up
select o.position, r.attempts, r.error,
    o.topic, o.source, o.id, o.key, o.time_ms, o.headers, o.due_ms, o.body
from duly.outbox_refused r join duly.outbox o on o.position = r.position
where r.due_ms is null order by o.position limit $1;

-- name: outbox_try_again
delete from duly.outbox_refused r using unnest($1::bigint[]) as s(position)
where r.position = s.position and r.due_ms is null;

-- name: outbox_backlog
select
    (select count(*) from duly.outbox) - (
        select count(*) from duly.outbox_refused where due_ms is null
    ),
    (select count(*) from duly.outbox_refused where due_ms is null),
    (
        select o.time_ms from duly.outbox o
        left join duly.outbox_refused r on r.position = o.position
        where r.position is null or r.due_ms is not null order by o.position limit 1
    );

-- name: outbox_hold
-- Be the relay for $2 more milliseconds, if it is already or the other's lease is over. By the
-- database's clock, which all relays share; $3 is another clock's time.
insert into duly.outbox_relay as held (one, relay, until_ms)
select true, $1, now_ms + $2
from (
    select coalesce($3::bigint, (extract(epoch from clock_timestamp()) * 1000)::bigint) as now_ms
) as clock
on conflict (one) do update set relay = excluded.relay, until_ms = excluded.until_ms
where held.relay = excluded.relay or held.until_ms <= excluded.until_ms - $2
returning relay;

-- name: outbox_let_go
delete from duly.outbox_relay where relay = $1;


-- ===== what people ask ========================================================================

-- name: inbox_forget_some
delete from duly.inbox where (flow_no, id) in (
    select i.flow_no, i.id from duly.inbox_flows f join duly.inbox i on i.flow_no = f.flow_no
    where f.consumer = ($1::text[])[1] limit ($2::bigint[])[1]
);

-- name: inbox_effect
select i.time_ms from duly.inbox_flows f join duly.inbox i on i.flow_no = f.flow_no
where f.consumer = $1::text and f.topic = $2::text and f.source = $3::text and i.id = $4::text
and i.mark >= 0;

-- name: outbox_of_person
select o.position, octet_length(o.body) from duly.outbox o
where ($1::text is null or o.key = $1::text) and ($2::text is null or o.id = $2::text)
and ($3::text is null or o.source = $3::text) and ($4::text is null or o.topic = $4::text)
limit nullif($5::bigint, -1);

-- name: outbox_erase
delete from duly.outbox where position = any ($1::bigint[]);

-- name: log_parked_of_person
select p.parked_id, octet_length(p.body) from duly.log_parked p
where ($1::text is null or p.key = $1::text) and ($2::text is null or p.id = $2::text)
and ($3::text is null or p.source = $3::text) and ($4::text is null or p.topic = $4::text)
limit nullif($5::bigint, -1);

-- name: log_parked_erase
delete from duly.log_parked where parked_id = any ($1::bigint[]);

-- name: log_dead_of_person
select d.dead_id, octet_length(d.body) from duly.log_dead d
where ($1::text is null or d.key = $1::text) and ($2::text is null or d.id = $2::text)
and ($3::text is null or d.source = $3::text) and ($4::text is null or d.topic = $4::text)
limit nullif($5::bigint, -1);

-- name: log_dead_erase
delete from duly.log_dead where dead_id = any ($1::bigint[]);

-- name: letters_of_person
select l.letter_id, octet_length(l.body) from duly.letters l
where ($1::text is null or l.key = $1::text) and ($2::text is null or l.id = $2::text)
and ($3::text is null or l.source = $3::text) and ($4::text is null or l.topic = $4::text)
limit nullif($5::bigint, -1);

-- name: letters_erase
delete from duly.letters where letter_id = any ($1::bigint[]);
