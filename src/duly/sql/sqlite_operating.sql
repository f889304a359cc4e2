-- What people ask of a log on SQLite: subscriptions held back, rewound and removed, messages
-- traced, followed and erased. Tables are in sqlite.sql.


-- ===== steering ===============================================================================

-- name: held_back
-- Nothing, in everyday life: every claim asks this first.
select s.subscription_no, h.under
from duly_steering h join duly_subscriptions s on s.name = h.name;

-- name: steered
select name, case when under is null then 'paused' else under end, since_ms
from duly_steering where under is null or under <> 'removed' order by name;

-- name: under_way
select under from duly_steering where name = ?;

-- name: recorded_guarantees
select distinct u.name, u.guarantee from duly_subscriptions u
where exists (select 1 from duly_cursors c where c.subscription_no = u.subscription_no);

-- name: pause
insert into duly_steering (name, paused, since_ms) values (?, 1, ?)
on conflict (name) do update set paused = 1 where paused = 0;

-- name: resume
delete from duly_steering where name = ? and under is null;

-- name: is_paused
select exists (select 1 from duly_steering where name = ? and paused);

-- name: hold_for
insert into duly_steering (name, paused, under, since_ms) values (?1, 0, ?2, ?3)
on conflict (name) do update set under = ?2;

-- name: let_go
-- What was paused before stays paused.
update duly_steering set under = null where name = ?;

-- name: let_go_unpaused
delete from duly_steering where name = ? and under is null and not paused;

-- name: let_go_for_good
delete from duly_steering where name = ?;

-- name: cursors_of
select t.name, c.stream, c.next_seq from duly_subscriptions u
    join duly_cursors c on c.subscription_no = u.subscription_no
    join duly_topics t on t.topic_no = u.topic_no
where u.name = ? order by t.name, c.stream;

-- name: first_dead
select min(d.position) from duly_dead d
    join duly_subscriptions u on u.subscription_no = d.subscription_no
where u.name = ? and d.position between ? and ? and d.time_ms >= ?;

-- name: count_kept
select count(*) from duly_messages where position between ? and ?;

-- name: count_dead_only
-- Dead letters that the log has forgotten.
select count(*) from duly_dead d
    join duly_subscriptions u on u.subscription_no = d.subscription_no
where u.name = ? and d.position between ? and ?
and not exists (select 1 from duly_messages m where m.position = d.position);

-- name: count_claimed
select coalesce(sum(last - first + 1), 0) from duly_claims
where subscription_no = ? and token is not null;

-- name: find_epoch
select time_ms from duly_epochs where name = ? and epoch = ?;

-- name: add_epoch
insert into duly_epochs (name, epoch, time_ms) values (?, ?, ?) on conflict do nothing;

-- name: take_back_cursor
update duly_cursors set next_seq = min(next_seq, ?) where subscription_no = ? and stream = ?;

-- name: cut_claims
-- What reaches over the place ends before it.
update duly_claims set last = ?1 - 1
where subscription_no = ?2 and first < ?1 and last >= ?1 and last < ?3;

-- name: drop_held_claims
delete from duly_claims
where subscription_no = ? and token is not null and first >= ? and first < ?;

-- name: superseded
-- Whether anything is left at or beyond a cursor: it was given out before the cursor came back.
select exists (
    select 1 from duly_cursors c join duly_claims o on o.subscription_no = c.subscription_no
        and o.first >= (c.stream << 40 | c.next_seq) and o.first < ((c.stream + 1) << 40)
    where c.subscription_no = ?1
) or exists (
    select 1 from duly_cursors c join duly_parked p on p.subscription_no = c.subscription_no
        and p.position >= (c.stream << 40 | c.next_seq) and p.position < ((c.stream + 1) << 40)
    where c.subscription_no = ?1
) or exists (
    select 1 from duly_cursors c join duly_dead d on d.subscription_no = c.subscription_no
        and d.position >= (c.stream << 40 | c.next_seq) and d.position < ((c.stream + 1) << 40)
    where c.subscription_no = ?1
);

-- name: drop_cursors
delete from duly_cursors where subscription_no = ?;

-- name: bury_name
insert into duly_steering (name, under, since_ms)
select name || '#' || subscription_no, ?2, ?3 from duly_subscriptions where name = ?1;

-- name: rename_dropped
-- No name has a # in it.
update duly_subscriptions set name = name || '#' || subscription_no where name = ?;

-- name: is_removed
update duly_steering set under = 'removed'
where name = (select name from duly_subscriptions where subscription_no = ?);

-- name: to_tidy
select s.subscription_no, h.under
from duly_steering h join duly_subscriptions s on s.name = h.name
where (h.name = ?1 and h.under = 'rewinding')
or (substr(h.name, 1, length(?1) + 1) = ?1 || '#' and h.under = 'removing');

-- name: tidy_claims_beyond
-- What stands at or beyond the cursor, after a rewind.
delete from duly_claims where claim_id in (
    select o.claim_id from duly_cursors c join duly_claims o
        on o.subscription_no = c.subscription_no
        and o.first >= (c.stream << 40 | c.next_seq) and o.first < ((c.stream + 1) << 40)
    where c.subscription_no = ? limit ?
);

-- name: tidy_claims
delete from duly_claims where claim_id in (
    select claim_id from duly_claims where subscription_no = ? limit ?
);

-- name: tidy_parked_beyond
delete from duly_parked where subscription_no = ?1 and position in (
    select p.position from duly_cursors c join duly_parked p
        on p.subscription_no = c.subscription_no
        and p.position >= (c.stream << 40 | c.next_seq) and p.position < ((c.stream + 1) << 40)
    where c.subscription_no = ?1 limit ?2
);

-- name: tidy_parked
delete from duly_parked where subscription_no = ?1 and position in (
    select position from duly_parked where subscription_no = ?1 limit ?2
);

-- name: tidy_dead_beyond
select d.dead_id, length(d.body) from duly_cursors c join duly_dead d
    on d.subscription_no = c.subscription_no
    and d.position >= (c.stream << 40 | c.next_seq) and d.position < ((c.stream + 1) << 40)
where c.subscription_no = ? limit ?;

-- name: tidy_dead
select dead_id, length(body) from duly_dead where subscription_no = ? limit ?;


-- ===== tracing and following ==================================================================

-- name: trace_identities
select t.name, i.position, i.time_ms from duly_topics t
    join duly_identities i on i.topic_no = t.topic_no and i.source = ? and i.id = ?
where t.exactly_once;

-- name: trace_messages
-- The log has no index on ids: this looks through all that is kept.
select m.position, t.name, cast(m.source as blob), cast(m.id as blob), cast(m.key as blob),
    m.time_ms, cast(m.headers as blob), m.due_ms, m.body
from duly_messages m join duly_streams s on s.stream = (m.position >> 40)
    join duly_topics t on t.topic_no = s.topic_no
where m.id = ?2 and m.source = ?1 order by m.position;

-- name: trace_dead
select position, topic, cast(source as blob), cast(id as blob), cast(key as blob),
    time_ms, cast(headers as blob), due_ms, body
from duly_dead where id = ?2 and source = ?1;

-- name: trace_mentioned
select topic, max(position) from duly_incidents
where source = ? and id = ? and topic is not null group by topic;

-- name: trace_incidents
-- By its identity, and of ranges that it was part of.
select time_ms, kind, topic, subscription, source, id, position, count, worker, detail
from duly_incidents
where topic = ?1 and ((source = ?2 and id = ?3)
    or (position <= ?4 and position + count > ?4)) order by incident_id;

-- name: trace_standings
select u.name, c.next_seq, o.claim_id, o.worker, o.attempt, o.replays,
    p.position, p.due_ms, p.attempt, p.error, p.replays,
    d.dead_ms, d.attempts, d.error, d.replays
from duly_cursors c join duly_subscriptions u on u.subscription_no = c.subscription_no
    left join duly_claims o
        on o.subscription_no = c.subscription_no and o.first <= ?1 and o.last >= ?1
    left join duly_parked p on p.subscription_no = c.subscription_no and p.position = ?1
    left join duly_dead d on d.subscription_no = c.subscription_no and d.position = ?1
where c.stream = ?2 order by u.name;

-- name: caused_by
select m.position, t.name, cast(m.source as blob), cast(m.id as blob), cast(m.key as blob),
    m.time_ms, cast(m.headers as blob), m.due_ms, m.body
from duly_messages m join duly_streams s on s.stream = (m.position >> 40)
    join duly_topics t on t.topic_no = s.topic_no
where m.headers is not null and json_valid(m.headers)
and json_extract(m.headers, '$.causationid') = ? order by m.position limit ?;

-- name: streams_by_topic
select s.stream, s.next_seq from duly_topics t join duly_streams s on s.topic_no = t.topic_no
where t.name = ? order by s.stream;

-- name: topic_names
select name from duly_topics;

-- name: follow
select position, cast(source as blob), cast(id as blob), cast(key as blob), time_ms,
    cast(headers as blob), due_ms, body
from duly_messages where position between ? and ? order by position limit ?;


-- ===== erasing ================================================================================

-- name: any_erased
-- Nothing, in everyday life: every exactly-once publish asks this first.
select exists (select 1 from duly_erased where topic_no = ?);

-- name: is_erased
select 1 from duly_erased where topic_no = ? and hash = ?;

-- name: forget_erased
delete from duly_erased where time_ms < ?1 - 1000 * (
    select identity_retention_s from duly_topics t where t.topic_no = duly_erased.topic_no
);

-- name: overwrite_deleted
-- What is deleted is overwritten with zeros, not only let go; from now on, on this connection
-- (a pragma acts when it is prepared, and the driver prepares one once).
pragma secure_delete = on;

-- name: erase_find
-- The log has no index on keys and ids: this looks through all that is kept.
select m.position, t.topic_no, length(m.body), t.name, m.source, m.id
from duly_messages m join duly_streams s on s.stream = (m.position >> 40)
    join duly_topics t on t.topic_no = s.topic_no
where (?1 is null or m.key = ?1) and (?2 is null or m.id = ?2)
and (?3 is null or m.source = ?3) and (?4 is null or t.name = ?4);

-- name: erase_find_dead
select d.dead_id, t.topic_no, length(d.body), d.topic, d.source, d.id
from duly_dead d join duly_topics t on t.name = d.topic
where (?1 is null or d.key = ?1) and (?2 is null or d.id = ?2)
and (?3 is null or d.source = ?3) and (?4 is null or d.topic = ?4);

-- name: erase_find_identities
select 0, t.topic_no, 0, t.name, i.source, i.id
from duly_topics t join duly_identities i on i.topic_no = t.topic_no
where i.source = ?3 and i.id = ?2 and (?4 is null or t.name = ?4);

-- name: erase_topics
select 0, topic_no, 0, name, ?3, ?2 from duly_topics where ?4 is null or name = ?4;

-- name: incidents_from
select incident_id, topic, source, id, position from duly_incidents
where incident_id > ? order by incident_id limit ?;

-- name: erase_incident
-- That it happened stays, and counts; whose it was and what it said goes.
update duly_incidents set source = null, id = null, detail = 'erased' where incident_id = ?;

-- name: erase_identity
delete from duly_identities where topic_no = ? and source = ? and id = ?;

-- name: remember_erased
insert into duly_erased (topic_no, hash, time_ms)
select topic_no, ?2, ?3 from duly_topics where topic_no = ?1 and exactly_once
on conflict do nothing;

-- name: promote_erased
-- What waits behind it goes on; claims look again.
update duly_parked set due_ms = 0
where due_ms is null and (subscription_no, key) in (
    select c.subscription_no, m.key from duly_messages m
        join duly_cursors c on c.stream = (m.position >> 40)
    where m.position = ?
);

-- name: erase_parked
delete from duly_parked where (subscription_no, position) in (
    select c.subscription_no, ?1 from duly_cursors c where c.stream = (?1 >> 40)
);

-- name: erase_message
delete from duly_messages where position = ?;


-- ===== health =================================================================================

-- name: latest_made
-- The last message of each stream: a few, whatever the log holds.
select max((
    select m.time_ms from duly_messages m
    where m.position >= (s.stream << 40) and m.position < ((s.stream + 1) << 40)
    order by m.position desc limit 1
)) from duly_streams s;


-- ===== counting ===============================================================================

-- name: published_counts
select t.name, sum(s.next_seq - 1) from duly_topics t
    join duly_streams s on s.topic_no = t.topic_no group by t.name;
