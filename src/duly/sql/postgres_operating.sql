-- What people ask of a log on PostgreSQL: subscriptions held back, rewound and removed, messages
-- traced, followed and erased, schedules, health and counts. Tables are in postgres.sql.


-- ===== steering ===============================================================================

-- name: held_back
-- Nothing, in everyday life: every claim asks this first.
select s.subscription_no, h.under
from duly.steering h join duly.subscriptions s on s.name = h.name;

-- name: steered
select name, coalesce(under, 'paused'), since_ms
from duly.steering where under is null or under <> 'removed' order by name;

-- name: under_way
-- Whoever asks goes by it: it stays so until his transaction ends.
select under from duly.steering where name = $1::text for update;

-- name: recorded_guarantees
select distinct u.name, u.guarantee from duly.subscriptions u
where exists (select 1 from duly.cursors c where c.subscription_no = u.subscription_no);

-- name: pause
insert into duly.steering as s (name, paused, since_ms)
select r.name, true, r.since_ms from unnest($1::text[], $2::bigint[]) as r (name, since_ms)
on conflict (name) do update set paused = true where not s.paused;

-- name: resume
delete from duly.steering where name = any ($1::text[]) and under is null;

-- name: is_paused
select exists (select 1 from duly.steering where name = $1::text and paused);

-- name: hold_for
insert into duly.steering (name, paused, under, since_ms) values ($1, false, $2, $3)
on conflict (name) do update set under = excluded.under;

-- name: let_go
-- What was paused before stays paused.
update duly.steering set under = null where name = $1::text;

-- name: let_go_unpaused
delete from duly.steering where name = $1::text and under is null and not paused;

-- name: let_go_for_good
delete from duly.steering where name = $1::text;

-- name: cursors_of
select t.name, c.stream, c.next_seq from duly.subscriptions u
    join duly.reached c on c.subscription_no = u.subscription_no
    join duly.topics t on t.topic_no = u.topic_no
where u.name = $1::text order by t.name, c.stream;

-- name: first_dead
select min(d.position) from duly.dead d
    join duly.subscriptions u on u.subscription_no = d.subscription_no
where u.name = $1::text and d.position between $2::bigint and $3::bigint
and d.time_ms >= $4::bigint;

-- name: count_kept
select count(*) from duly.stretch($1::bigint, $2::bigint);

-- name: count_dead_only
-- Dead letters that the log has forgotten.
select count(*) from duly.dead d
    join duly.subscriptions u on u.subscription_no = d.subscription_no
where u.name = $1::text and d.position between $2::bigint and $3::bigint
and not exists (select 1 from duly.messages m where m.place = d.place);

-- name: count_claimed
select coalesce(sum(last - first + 1), 0)::bigint from duly.claims
where subscription_no = $1::int and token is not null;

-- name: find_epoch
select time_ms from duly.epochs where name = $1::text and epoch = $2::text;

-- name: add_epoch
insert into duly.epochs (name, epoch, time_ms) values ($1, $2, $3) on conflict do nothing;

-- name: lock_held
-- Whoever settles or extends one of these, or has fenced it, is waited for.
select claim_id from duly.claims
where subscription_no = $1::int and token is not null order by claim_id for update;

-- name: take_back_cursor
-- Cursors are rows added; the largest counts. Whoever does this has retention's lock.
with gone as (
    delete from duly.cursors
    where subscription_no = $2::int and stream = $3::bigint and next_seq > $1::bigint
    returning 1
)
insert into duly.cursors (subscription_no, stream, next_seq)
select $2::int, $3::bigint, $1::bigint where exists (select 1 from gone)
on conflict do nothing;

-- name: cut_claims
-- What reaches over the place ends before it.
update duly.claims set last = $1::bigint - 1
where subscription_no = $2::int and first < $1::bigint and last >= $1::bigint
and last < $3::bigint;

-- name: drop_held_claims
delete from duly.claims
where subscription_no = $1::int and token is not null and first >= $2::bigint
and first < $3::bigint;

-- name: superseded
-- Whether anything is left at or beyond a cursor: it was given out before the cursor came back.
select exists (
    select 1 from duly.reached c join duly.claims o on o.subscription_no = c.subscription_no
        and o.first >= (c.stream << 40 | c.next_seq) and o.first < ((c.stream + 1) << 40)
    where c.subscription_no = $1::int
) or exists (
    select 1 from duly.reached c join duly.parked p on p.subscription_no = c.subscription_no
        and p.position >= (c.stream << 40 | c.next_seq) and p.position < ((c.stream + 1) << 40)
    where c.subscription_no = $1::int
) or exists (
    select 1 from duly.reached c join duly.dead d on d.subscription_no = c.subscription_no
        and d.position >= (c.stream << 40 | c.next_seq) and d.position < ((c.stream + 1) << 40)
    where c.subscription_no = $1::int
);

-- name: drop_cursors
delete from duly.cursors where subscription_no = $1::int;

-- name: bury_name
insert into duly.steering (name, paused, under, since_ms)
select name || '#' || subscription_no, false, $2::text, $3::bigint
from duly.subscriptions where name = $1::text;

-- name: rename_dropped
-- No name has a # in it.
update duly.subscriptions set name = name || '#' || subscription_no where name = $1::text;

-- name: is_removed
update duly.steering set under = 'removed'
where name = (select name from duly.subscriptions where subscription_no = $1::int);

-- name: to_tidy
select s.subscription_no, h.under
from duly.steering h join duly.subscriptions s on s.name = h.name
where (h.name = $1::text and h.under = 'rewinding')
or (starts_with(h.name, $1::text || '#') and h.under = 'removing');

-- name: tidy_claims_beyond
-- What stands at or beyond the cursor, after a rewind.
delete from duly.claims where claim_id in (
    select o.claim_id from duly.reached c join duly.claims o
        on o.subscription_no = c.subscription_no
        and o.first >= (c.stream << 40 | c.next_seq) and o.first < ((c.stream + 1) << 40)
    where c.subscription_no = ($1::bigint[])[1] limit ($2::bigint[])[1]
);

-- name: tidy_claims
delete from duly.claims where claim_id in (
    select claim_id from duly.claims where subscription_no = ($1::bigint[])[1]
    limit ($2::bigint[])[1]
);

-- name: tidy_parked_beyond
delete from duly.parked where subscription_no = ($1::bigint[])[1] and position in (
    select p.position from duly.reached c join duly.parked p
        on p.subscription_no = c.subscription_no
        and p.position >= (c.stream << 40 | c.next_seq) and p.position < ((c.stream + 1) << 40)
    where c.subscription_no = ($1::bigint[])[1] limit ($2::bigint[])[1]
);

-- name: tidy_parked
delete from duly.parked where subscription_no = ($1::bigint[])[1] and position in (
    select position from duly.parked where subscription_no = ($1::bigint[])[1]
    limit ($2::bigint[])[1]
);

-- name: tidy_dead_beyond
select d.dead_id, octet_length(d.body) from duly.reached c join duly.dead d
    on d.subscription_no = c.subscription_no
    and d.position >= (c.stream << 40 | c.next_seq) and d.position < ((c.stream + 1) << 40)
where c.subscription_no = $1::int limit $2::bigint;

-- name: tidy_dead
select dead_id, octet_length(body) from duly.dead where subscription_no = $1::int limit $2::bigint;


-- ===== tracing and following ==================================================================

-- name: trace_identities
select t.name, r.position + i.place - r.place, i.time_ms
from duly.topics t
    join duly.identities i on i.topic_no = t.topic_no and i.source = $1::text and i.id = $2::text
    left join duly.runs r on (r.place >> 16) = (i.place >> 16)
        and i.place >= r.place and i.place < r.place + r.count
where t.exactly_once;

-- name: trace_messages
-- The log has no index on ids: this looks through all that is kept.
select m.position, t.name, m.source, m.id, m.key, m.time_ms, m.headers, m.due_ms, m.body
from duly.located m join duly.streams s on s.stream = m.stream
    join duly.topics t on t.topic_no = s.topic_no
where m.id = $2::text and m.source = $1::text order by m.place;

-- name: trace_dead
select position, topic, source, id, key, time_ms, headers, due_ms, body
from duly.dead where id = $2::text and source = $1::text;

-- name: trace_mentioned
select topic, max(position) from duly.incidents
where source = $1::text and id = $2::text and topic is not null group by topic;

-- name: trace_incidents
-- By its identity, and of ranges that it was part of.
select time_ms, kind, topic, subscription, source, id, position, count, worker, detail
from duly.incidents
where topic = $1::text and ((source = $2::text and id = $3::text)
    or (position <= $4::bigint and position + count > $4::bigint)) order by incident_id;

-- name: trace_standings
select u.name, c.next_seq, o.claim_id, o.worker, o.attempt, o.replays,
    p.position, p.due_ms, p.attempt, p.error, p.replays,
    d.dead_ms, d.attempts, d.error, d.replays
from duly.reached c join duly.subscriptions u on u.subscription_no = c.subscription_no
    left join duly.claims o on o.subscription_no = c.subscription_no
        and o.first <= $1::bigint and o.last >= $1::bigint
    left join duly.parked p on p.subscription_no = c.subscription_no and p.position = $1::bigint
    left join duly.dead d on d.subscription_no = c.subscription_no and d.position = $1::bigint
where c.stream = $2::bigint order by u.name;

-- name: caused_by
-- Headers are JSON as duly writes it: only a header of this name is followed by a bare colon.
select m.position, t.name, m.source, m.id, m.key, m.time_ms, m.headers, m.due_ms, m.body
from duly.located m join duly.streams s on s.stream = m.stream
    join duly.topics t on t.topic_no = s.topic_no
where m.position is not null
and strpos(m.headers, '"causationid":' || to_json($1::text)::text) > 0
order by m.position limit $2::bigint;

-- name: streams_by_topic
select s.stream, coalesce((
    select r.position + r.count - (s.stream << 40) from duly.runs r
    where r.position >= s.stream << 40 and r.position < (s.stream + 1) << 40
    order by r.position desc limit 1
), 1)
from duly.topics t join duly.streams s on s.topic_no = t.topic_no
where t.name = $1::text order by s.stream;

-- name: topic_names
select name from duly.topics;

-- name: follow
-- In the order of the runs, so that a limit ends it after as many messages.
select r.position + m.place - r.place, m.source, m.id, m.key, m.time_ms, m.headers, m.due_ms, m.body
from duly.runs r cross join lateral (
    select * from duly.messages
    where messages.place >= r.place + greatest($1::bigint - r.position, 0)
    and messages.place < r.place + least($2::bigint + 1 - r.position, r.count)
    order by messages.place limit r.count
) m
where r.position >= coalesce(
    (select max(p.position) from duly.runs p where p.position <= $1::bigint), $1::bigint
) and r.position <= $2::bigint
order by r.position, m.place limit $3::bigint;


-- ===== erasing ================================================================================

-- name: forget_erased
delete from duly.erased e using duly.topics t
where t.topic_no = e.topic_no and e.time_ms < $1::bigint - (1000 * t.identity_retention_s)::bigint;

-- name: overwrite_deleted
-- The server lets go of what is deleted; VACUUM makes room of it, and its WAL is the server's.
select 1 where false;

-- name: lock_identities
-- Who is just publishing an identity commits first, or finds that it is erased; see `erasing`.
lock table duly.identities in share row exclusive mode;

-- name: lock_soon
-- Publishers queue behind who waits for them.
select set_config('lock_timeout', '2s', true);

-- name: lock_holders
-- Who is just ending a claim on one of these may have read it before it was deleted.
select c.claim_id from unnest($1::bigint[]) as r (position)
    join duly.claims c on c.first <= r.position and c.last >= r.position
order by c.claim_id for update of c;

-- name: erase_find
-- The log has no index on keys and ids: this looks through all that is kept.
select m.position, t.topic_no, octet_length(m.body), t.name, m.source, m.id
from duly.located m join duly.streams s on s.stream = m.stream
    join duly.topics t on t.topic_no = s.topic_no
where m.position is not null and ($1::text is null or m.key = $1::text)
and ($2::text is null or m.id = $2::text) and ($3::text is null or m.source = $3::text)
and ($4::text is null or t.name = $4::text);

-- name: erase_find_dead
select d.dead_id, t.topic_no, octet_length(d.body), d.topic, d.source, d.id
from duly.dead d join duly.topics t on t.name = d.topic
where ($1::text is null or d.key = $1::text) and ($2::text is null or d.id = $2::text)
and ($3::text is null or d.source = $3::text) and ($4::text is null or d.topic = $4::text);

-- name: erase_find_identities
-- The key counts for nothing: who gives an id and none.
select 0, t.topic_no, 0, t.name, i.source, i.id
from duly.topics t join duly.identities i on i.topic_no = t.topic_no
where i.source = $3::text and i.id = $2::text and ($4::text is null or t.name = $4::text)
and ($1::text is null or true);

-- name: erase_topics
select 0, topic_no, 0, name, $3::text, $2::text from duly.topics
where ($4::text is null or name = $4::text) and ($1::text is null or true);

-- name: incidents_from
select incident_id, topic, source, id, position from duly.incidents
where incident_id > $1::bigint order by incident_id limit $2::bigint;

-- name: erase_incident
-- That it happened stays, and counts; whose it was and what it said goes.
update duly.incidents set source = null, id = null, detail = 'erased'
where incident_id = any ($1::bigint[]);

-- name: erase_identity
delete from duly.identities i
using unnest($1::bigint[], $2::text[], $3::text[]) as r (topic_no, source, id)
where i.topic_no = r.topic_no and i.source = r.source and i.id = r.id;

-- name: remember_erased
insert into duly.erased (topic_no, hash, time_ms)
select r.topic_no, r.hash, r.time_ms
from unnest($1::bigint[], $2::bytea[], $3::bigint[]) as r (topic_no, hash, time_ms)
    join duly.topics t on t.topic_no = r.topic_no and t.exactly_once
on conflict do nothing;

-- name: promote_erased
-- What waits behind it goes on; claims look again.
update duly.parked p set due_ms = 0
from unnest($1::bigint[]) as r (position)
    join duly.messages m on m.place = duly.place_of(r.position)
where p.due_ms is null and p.key = m.key and (p.position >> 40) = (r.position >> 40);

-- name: erase_parked
delete from duly.parked p
using unnest($1::bigint[]) as r (position)
    join duly.streams s on s.stream = (r.position >> 40)
    join duly.subscriptions u on u.topic_no = s.topic_no
where p.subscription_no = u.subscription_no and p.position = r.position;

-- name: erase_message
delete from duly.messages where place = any (array(
    select duly.place_of(r.position) from unnest($1::bigint[]) as r (position)
));


-- ===== schedules ==============================================================================

-- name: reached_tick
select tick_ms from duly.schedules where name = $1::text;

-- name: reached_ticks
select name, tick_ms from duly.schedules order by name;

-- name: start_schedule
insert into duly.schedules (name, tick_ms) values ($1, $2) on conflict do nothing;

-- name: move_tick
-- Who comes second waits for the first, and finds it moved.
update duly.schedules set tick_ms = $3::bigint
where name = $1::text and tick_ms = $2::bigint returning tick_ms;


-- ===== health =================================================================================

-- name: followed_offset
select boot_id, offset_ms from duly.clock;

-- name: latest_made
-- The last message of each stream: a few, whatever the log holds.
select max(m.time_ms) from duly.streams s
    cross join lateral (
        select place, count from duly.runs
        where position >= s.stream << 40 and position < (s.stream + 1) << 40
        order by position desc limit 1
    ) r
    join duly.messages m on m.place = r.place + r.count - 1;


-- ===== counting ===============================================================================

-- name: published_counts
select t.name, sum(
    coalesce((
        select r.position + r.count - (s.stream << 40) - 1 from duly.runs r
        where r.position >= s.stream << 40 and r.position < (s.stream + 1) << 40
        order by r.position desc limit 1
    ), 0) + coalesce((select sum(a.count) from duly.arrivals a where a.stream = s.stream), 0)
)::bigint
from duly.topics t join duly.streams s on s.topic_no = t.topic_no group by t.name;

-- name: come_to_work
-- To be known by name as long as its session holds its lock.
insert into duly.attendance (number, name) values ($1, $2)
on conflict (number) do update set name = excluded.name;

-- name: forget_absent
delete from duly.attendance where number <> all (array(
    select objid::bigint from pg_locks
    where locktype = 'advisory' and classid = 'duly.workers'::regclass and objsubid = 2
    and database = (select oid from pg_database where datname = current_database())
));

-- name: leave_work
select pg_advisory_unlock('duly.workers'::regclass::oid::int, $1::int);

-- name: present
select name from duly.attendance where number = any (array(
    select objid::bigint from pg_locks
    where locktype = 'advisory' and classid = 'duly.workers'::regclass and objsubid = 2
    and database = (select oid from pg_database where datname = current_database())
)) order by number;
