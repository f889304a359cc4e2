-- Every statement of duly's log on SQLite: an append-only log, and claims on ranges of it.
--
-- A position is (stream << 40) | seq. The order of positions is the order of delivery, and a
-- position is never handed out twice: seq comes from a counter, not from what is stored.


-- ===== tables =================================================================================

-- name: log_schema
-- The last token given out by code of schema 4 or before, which may run beside this.
create table if not exists duly_token (
    only_row integer primary key check (only_row = 1),
    value integer not null
);
insert or ignore into duly_token values (1, 0);

-- By how much the wall clock was ahead of the time since boot when a lane last looked.
create table if not exists duly_clock (
    only_row integer primary key check (only_row = 1),
    boot_id text not null,
    offset_ms integer not null
);

-- partitions 0: no order, one stream.
create table if not exists duly_topics (
    topic_no integer primary key,
    name text not null unique,
    exactly_once integer not null,
    partitions integer not null,
    retention_s real not null,
    identity_retention_s real not null
);

create table if not exists duly_streams (
    stream integer primary key,
    topic_no integer not null,
    partition integer not null,
    next_seq integer not null,
    -- The largest body and the latest due time there ever were: what spares claims to measure.
    largest integer not null default 0,
    latest_due_ms integer not null default 0,
    unique (topic_no, partition)
);

-- The body comes last: what stands behind a large one costs a walk over its pages.
create table if not exists duly_messages (
    position integer primary key,
    source text not null,
    id text not null,
    key text,
    time_ms integer not null,
    headers text,
    due_ms integer,
    body blob not null
);

-- What exactly-once topics remember to drop repeats, kept apart from the log.
create table if not exists duly_identities (
    topic_no integer not null,
    source text not null,
    id text not null,
    hash blob not null,
    position integer not null,
    time_ms integer not null,
    primary key (topic_no, source, id)
) without rowid;

-- One row a topic: a lane sees only the topics it asks for, whatever else the name once had.
create table if not exists duly_subscriptions (
    subscription_no integer primary key,
    name text not null,
    topic_no integer not null,
    guarantee text not null,
    order_by_key integer not null,
    hold_key_on_dead integer not null,
    unique (name, topic_no)
);

-- Everything of the stream before next_seq was given out, parked or settled once.
create table if not exists duly_cursors (
    subscription_no integer not null,
    stream integer not null,
    next_seq integer not null,
    primary key (subscription_no, stream)
) without rowid;

-- One row a contiguous range of unsettled messages. token null: nobody's, to be given out again.
-- Tokens are the time since boot when they were made, so that giving one out writes no page. The
-- first range of a claim has it for its claim_id too: a claim of one range, as nearly all are, is in
-- no index, and each index that a row comes into and leaves is one more page to write in every batch.
-- alone 1: one at a time, for a death of its holder has to be charged to somebody.
-- alone 2: was claimed by a call for one message.
-- alone 3: as 1, and with nothing else in its worker: it was alone in its claim when a worker died
-- that held other claims too.
-- alone 4: was 1 or 3 when its holder lost another claim. Lost too, it becomes 3 and is not charged.
create table if not exists duly_claims (
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

create index if not exists duly_claims_free
on duly_claims (subscription_no, first) where token is null;

create index if not exists duly_claims_further
on duly_claims (token, first) where claim_id <> token;

-- Those that wait: for a retry, for their due time, or (due_ms null) behind another of their key.
create table if not exists duly_parked (
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

create index if not exists duly_parked_due on duly_parked (subscription_no, due_ms);

create index if not exists duly_parked_key on duly_parked (subscription_no, key, position);

-- A full copy: the log forgets a message once every subscription is done with it.
create table if not exists duly_dead (
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

create index if not exists duly_dead_key on duly_dead (subscription_no, key, position);

-- What was not plain success. count > 1: as many messages, from position on.
create table if not exists duly_incidents (
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

-- Up to which of its ticks a schedule has published.
create table if not exists duly_schedules (
    name text primary key,
    tick_ms integer not null
) without rowid;

-- Subscriptions that people hold back. under: rewinding, or of a name that was given up (with
-- the number behind a #) removing or removed; null: only paused.
create table if not exists duly_steering (
    name text primary key,
    paused integer not null default 0,
    under text,
    since_ms integer not null
) without rowid;

-- The lives that a subscription was declared to begin, each once.
create table if not exists duly_epochs (
    name text not null,
    epoch text not null,
    time_ms integer not null,
    primary key (name, epoch)
) without rowid;

-- Of identities whose message a person had erased only a hash, which drops a repeat.
create table if not exists duly_erased (
    topic_no integer not null,
    hash blob not null,
    time_ms integer not null,
    primary key (topic_no, hash)
) without rowid;


-- ===== topics =================================================================================

-- name: find_topic
select topic_no, exactly_once, partitions from duly_topics where name = ?;

-- name: add_topic
insert into duly_topics (name, exactly_once, partitions, retention_s, identity_retention_s)
values (?, ?, ?, ?, ?) returning topic_no;

-- name: update_topic
update duly_topics set retention_s = ?, identity_retention_s = ? where topic_no = ?;

-- name: add_stream
insert into duly_streams (topic_no, partition, next_seq) values (?, ?, 1);

-- name: streams_of_topic
select stream from duly_streams where topic_no = ? order by partition;


-- ===== publishing =============================================================================

-- name: take_positions
-- Take as many positions of the stream; returns the first sequence number after them.
update duly_streams set next_seq = next_seq + ?1, largest = max(largest, ?2),
    latest_due_ms = max(latest_due_ms, ?3)
where stream = ?4;
select next_seq from duly_streams where stream = ?4;

-- name: append_plain
-- Messages without key, headers and due time.
insert into duly_messages (position, source, id, time_ms, body) values (?, ?, ?, ?, ?);

-- name: append
insert into duly_messages (position, source, id, key, time_ms, headers, due_ms, body)
values (?, ?, ?, ?, ?, ?, ?, ?);

-- name: remember
insert into duly_identities (topic_no, source, id, hash, position, time_ms)
values (?1, ?, ?, ?, ?, ?2) on conflict do nothing;

-- name: forget
-- Undo `remember` where it was ours: an identity that was there before has another position.
delete from duly_identities where topic_no = ? and source = ? and id = ? and position = ?;

-- name: known_hash
select hash from duly_identities where topic_no = ? and source = ? and id = ?;


-- ===== subscribing ============================================================================

-- name: find_subscription
select topic_no, subscription_no, guarantee from duly_subscriptions where name = ?;

-- name: add_subscription
insert into duly_subscriptions (name, topic_no, guarantee, order_by_key, hold_key_on_dead)
values (?, ?, ?, ?, ?) returning subscription_no;

-- name: update_subscription
update duly_subscriptions set order_by_key = ?, hold_key_on_dead = ? where subscription_no = ?;

-- name: streams_without_cursor
select s.stream, s.next_seq from duly_streams s
where s.topic_no = ?2 and not exists (
    select 1 from duly_cursors c where c.subscription_no = ?1 and c.stream = s.stream
) order by s.stream;

-- name: add_cursor
insert into duly_cursors (subscription_no, stream, next_seq) values (?, ?, ?);

-- name: first_position
-- The oldest kept position of a range made at or after a time.
select position from duly_messages
where position between ? and ? and time_ms >= ? order by position limit 1;

-- name: unpark_behind
-- What waits behind another is due; claims look again whether it still has to wait.
update duly_parked set due_ms = 0 where subscription_no = ? and due_ms is null;


-- ===== claiming ===============================================================================

-- name: outlook
-- Whether people hold the subscription back, whether a range is nobody's, and when the next parked
-- message is due; with each stream of messages that were never given out, or with nulls.
select
    exists (
        select 1 from duly_steering h join duly_subscriptions s on s.name = h.name
        where s.subscription_no = ?1
    ),
    exists (select 1 from duly_claims where token is null and subscription_no = ?1),
    (select min(due_ms) from duly_parked where subscription_no = ?1 and due_ms is not null),
    c.stream, c.next_seq, s.next_seq, s.largest, s.latest_due_ms
from (select 1) left join (
    duly_cursors c join duly_streams s on s.stream = c.stream
) on c.subscription_no = ?1 and c.next_seq < s.next_seq;

-- name: outlook_ordered
-- The same in order by key: a stream that is being worked has nothing to give, and one with
-- claims no fresh messages.
select
    exists (
        select 1 from duly_steering h join duly_subscriptions s on s.name = h.name
        where s.subscription_no = ?1
    ),
    exists (
        select 1 from duly_claims f where f.token is null and f.subscription_no = ?1
        and (f.first >> 40) not in (
            select o.first >> 40 from duly_claims o
            where o.subscription_no = ?1 and o.token is not null
        )
    ),
    (
        select p.due_ms from duly_parked p
        where p.subscription_no = ?1 and p.due_ms is not null
        and (p.position >> 40) not in (
            select o.first >> 40 from duly_claims o where o.subscription_no = ?1
        )
        order by p.due_ms limit 1
    ),
    c.stream, c.next_seq, s.next_seq, s.largest, s.latest_due_ms
from (select 1) left join (
    duly_cursors c join duly_streams s on s.stream = c.stream
) on c.subscription_no = ?1 and c.next_seq < s.next_seq
    and not exists (
        select 1 from duly_claims o
        where o.subscription_no = ?1 and (o.first >> 40) = c.stream
    );

-- name: measure
select coalesce(sum(length(body)), 0) from duly_messages where position between ? and ?;

-- name: sizes
select position, length(body) from duly_messages where position between ? and ?
order by position;

-- name: fetch
select position, source, id, time_ms, key, headers, due_ms, body
from duly_messages where position between ? and ? order by position;

-- name: fetch_span
-- For handlers that look at nothing else, where the range has no gaps.
select body from duly_messages where position between ? and ? order by position;

-- name: fetch_ids
select cast(id as blob) from duly_messages where position between ? and ? order by position;

-- name: fetch_span_with_identities
select source, id, body from duly_messages where position between ? and ? order by position;

-- name: ids_of_span
-- As one JSON text, which costs a fraction of a row for each. In order of the positions, because
-- no index is used; an order by in here would cost as much as the rows.
select json_group_array(id) from duly_messages not indexed where position between ? and ?;

-- name: identities_of_span
-- The same with the least and the greatest source, which nearly always are one.
select json_group_array(id), min(source), max(source)
from duly_messages not indexed where position between ? and ?;

-- name: fetch_bodies
select position, id, body from duly_messages where position between ? and ? order by position;

-- name: fetch_raw
-- The same as fetch, for rows whose text is no text.
select position, cast(source as blob), cast(id as blob), time_ms,
    cast(key as blob), cast(headers as blob), due_ms, body
from duly_messages where position between ? and ? order by position;

-- name: move_cursor
update duly_cursors set next_seq = ? where subscription_no = ? and stream = ?;

-- name: add_claim
insert into duly_claims (
    claim_id, subscription_no, first, last, attempt, alone, repeated, replays,
    token, worker, lane, boot_id, lease_until_boot_ms
)
select iif(exists (select 1 from duly_claims where claim_id = ?8), null, ?8),
    ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12;

-- name: park_not_due
-- Messages of a fresh range that are not due yet.
insert into duly_parked (subscription_no, position, key, due_ms, attempt, alone, repeated)
select ?1, position, key, due_ms, 1, 0, 0 from duly_messages
where position between ?2 and ?3 and due_ms > ?4
returning position;

-- name: has_blockers
select exists (select 1 from duly_parked where subscription_no = ?1)
    or exists (select 1 from duly_dead where subscription_no = ?1 and ?2);

-- name: park_behind
-- Messages of a range whose key has an earlier one parked, or (?9) dead and unresolved.
insert into duly_parked (
    subscription_no, position, key, due_ms, attempt, alone, repeated, replays
)
select ?1, m.position, m.key, null, ?5, ?6, ?7, ?8 from duly_messages m
where m.position between ?2 and ?3 and m.key is not null and (
    exists (
        select 1 from duly_parked p where p.subscription_no = ?1 and p.key = m.key
        and p.position >= ?4 and p.position < m.position
    ) or (?9 and exists (
        select 1 from duly_dead d where d.subscription_no = ?1 and d.key = m.key
        and d.position >= ?4 and d.position < m.position
    ))
)
on conflict do nothing returning position;

-- name: parked_due
select p.position, p.attempt, p.alone, p.repeated, p.due_ms, length(m.body), p.replays
from duly_parked p left join duly_messages m on m.position = p.position
where p.subscription_no = ? and p.due_ms <= ? order by p.due_ms, p.position limit ?;

-- name: put_behind
-- In order by key: what came due though an earlier one of its key is parked or dead waits on.
update duly_parked as p set due_ms = null
where p.subscription_no = ?1 and p.due_ms <= ?2 and p.key is not null and (
    exists (
        select 1 from duly_parked q where q.subscription_no = ?1 and q.key = p.key
        and q.position < p.position and (q.position >> 40) = (p.position >> 40)
    ) or (?3 and exists (
        select 1 from duly_dead d where d.subscription_no = ?1 and d.key = p.key
        and d.position < p.position and (d.position >> 40) = (p.position >> 40)
    ))
);

-- name: parked_due_ordered
select p.position, p.attempt, p.alone, p.repeated, p.due_ms, length(m.body), p.replays
from duly_parked p left join duly_messages m on m.position = p.position
where p.subscription_no = ?1 and p.due_ms <= ?2
and (p.position >> 40) not in (
    select o.first >> 40 from duly_claims o where o.subscription_no = ?1
)
order by p.position limit ?3;

-- name: parked_behind
-- Those that wait behind this one, in order.
select f.position, f.attempt, f.alone, f.repeated, f.due_ms, length(m.body), f.replays
from duly_parked h join duly_parked f on f.subscription_no = ?1 and f.key = h.key
    left join duly_messages m on m.position = f.position
where h.subscription_no = ?1 and h.position = ?2
and f.position > ?2 and (f.position >> 40) = (?2 >> 40)
and not (?4 and exists (
    select 1 from duly_dead d where d.subscription_no = ?1 and d.key = h.key
    and d.position < f.position and (d.position >> 40) = (f.position >> 40)
))
order by f.position limit ?3;

-- name: unpark
delete from duly_parked where subscription_no = ? and position = ?;

-- name: free_ranges
-- Save the accused: these wait for a worker of their own, and keep nobody behind them waiting.
select claim_id, first, last, attempt, alone, repeated, replays from duly_claims
where token is null and subscription_no = ? and alone <> 3 order by first limit ?;

-- name: free_ranges_ordered
-- What keeps a stream is looked for once, and not for each of its ranges: there may be thousands.
select f.claim_id, f.first, f.last, f.attempt, f.alone, f.repeated, f.replays from duly_claims f
left join (
    select first >> 40 as stream, min(first) as first from duly_claims
    where token is null and subscription_no = ?1 and alone = 3 group by first >> 40
) a on a.stream = (f.first >> 40)
where f.token is null and f.subscription_no = ?1 and f.alone <> 3
and (a.first is null or a.first > f.first)
and (f.first >> 40) not in (
    select o.first >> 40 from duly_claims o where o.subscription_no = ?1 and o.token is not null
)
order by f.first limit ?2;

-- name: accused_ranges
select claim_id, first, last, attempt, alone, repeated, replays from duly_claims
where token is null and subscription_no = ? and alone = 3 order by first limit 1;

-- name: accused_ranges_ordered
select f.claim_id, f.first, f.last, f.attempt, f.alone, f.repeated, f.replays from duly_claims f
where f.token is null and f.subscription_no = ?1 and f.alone = 3
and f.first in (
    select min(first) from duly_claims
    where token is null and subscription_no = ?1 group by first >> 40
)
and (f.first >> 40) not in (
    select o.first >> 40 from duly_claims o where o.subscription_no = ?1 and o.token is not null
)
order by f.first limit 1;

-- name: accused_waits
select exists (select 1 from duly_claims where token is null and alone = 3);

-- name: holds_anything
-- Whether this worker has claimed anything, of whichever subscription.
select exists (select 1 from duly_claims where token is not null and worker = ?);

-- name: holds_accused
-- Whether this worker still holds a message that runs with nothing beside it.
select exists (
    select 1 from duly_claims where token is not null and alone = 3
    and worker = ?1 and boot_id = ?2 and lease_until_boot_ms > ?3
);

-- name: cut_range
update duly_claims set first = ? where claim_id = ?;

-- name: drop_claim
delete from duly_claims where claim_id = ?;

-- name: drop_whole_claim
-- Where it is still this range, stamped by this transaction (?4, null where there was no fence);
-- returns whose it was, and whether messages of its subscription wait behind others.
select subscription_no, exists (
    select 1 from duly_parked p
    where p.subscription_no = duly_claims.subscription_no and p.due_ms is null
)
from duly_claims
where token = ?1 and last = ?3 and (?4 is null or mark = ?4) and claim_id = coalesce(
    (select claim_id from duly_claims where claim_id = ?1 and first = ?2),
    (select claim_id from duly_claims where token = ?1 and claim_id <> token and first = ?2)
);
delete from duly_claims
where token = ?1 and last = ?3 and (?4 is null or mark = ?4) and claim_id = coalesce(
    (select claim_id from duly_claims where claim_id = ?1 and first = ?2),
    (select claim_id from duly_claims where token = ?1 and claim_id <> token and first = ?2)
);


-- ===== holding and losing claims ==============================================================

-- name: holders
-- Who holds claims of a subscription, and until when at the earliest.
select worker, boot_id, min(lease_until_boot_ms) from duly_claims
where subscription_no = ? and token is not null group by worker, boot_id;

-- name: held
-- Of every subscription: what a death may be charged to is decided by all that its worker held.
select claim_id, subscription_no, first, last, attempt, alone, worker, boot_id,
    lease_until_boot_ms
from duly_claims where token is not null order by subscription_no, first;

-- name: free_suspect
-- Nobody's, and to be given out one message at a time.
update duly_claims set token = null, worker = null, lane = null, boot_id = null,
    lease_until_boot_ms = null, mark = null, alone = ?, repeated = 1, attempt = ?
where claim_id = ?;

-- name: forget_alone
-- What a worker still holds that has lost a part: when this is lost too, perhaps to the same
-- standstill, it was not the only one.
update duly_claims set alone = iif(alone in (1, 3, 4), 4, 0) where worker = ? and token is not null;

-- name: free_lane
-- What a closing lane holds. It may have run, though nobody settled it.
update duly_claims set token = null, worker = null, lane = null, boot_id = null,
    lease_until_boot_ms = null, mark = null, repeated = 1,
    alone = case alone when 1 then 1 when 3 then 3 when 4 then 1 else 0 end
where subscription_no = ? and worker = ? and lane = ? and token is not null;

-- name: pieces
select claim_id, subscription_no, first, last, attempt, alone, repeated, mark, worker, replays
from duly_claims where token = ?1 and claim_id in (
    select ?1 union all select claim_id from duly_claims where token = ?1 and claim_id <> token
)
order by first;

-- name: pieces_at_rest
-- Those that no other transaction holds: with one writer, all.
select claim_id from duly_claims where token = ?1 and claim_id in (
    select ?1 union all select claim_id from duly_claims where token = ?1 and claim_id <> token
);

-- name: pieces_seen
select claim_id, subscription_no, first, last, attempt, alone, repeated, mark, worker, replays
from duly_claims where token = ?1 and claim_id in (
    select ?1 union all select claim_id from duly_claims where token = ?1 and claim_id <> token
)
order by first;

-- name: stamp_range
update duly_claims set mark = ?1 where token = ?2 and last = ?4 and claim_id = coalesce(
    (select claim_id from duly_claims where claim_id = ?2 and first = ?3),
    (select claim_id from duly_claims where token = ?2 and claim_id <> token and first = ?3)
);

-- name: stamp
update duly_claims set mark = ?1 where token = ?2 and claim_id in (
    select ?2 union all select claim_id from duly_claims where token = ?2 and claim_id <> token
);
select first, last from duly_claims where token = ?2 and claim_id in (
    select ?2 union all select claim_id from duly_claims where token = ?2 and claim_id <> token
);

-- name: stamped
select 1 from duly_claims where mark = ? limit 1;

-- name: renew
update duly_claims set lease_until_boot_ms = ? where claim_id = ?;

-- name: split_claim
-- A further piece of the same claim.
insert into duly_claims (
    subscription_no, first, last, attempt, alone, repeated, replays,
    token, worker, lane, boot_id, lease_until_boot_ms, mark
)
select subscription_no, ?2, ?3, attempt, alone, repeated, replays,
    token, worker, lane, boot_id, lease_until_boot_ms, mark
from duly_claims where claim_id = ?1;

-- name: resize_claim
update duly_claims set first = ?, last = ? where claim_id = ?;


-- name: known_offset
select boot_id, offset_ms from duly_clock;

-- name: put_offset
insert into duly_clock values (1, ?, ?)
on conflict do update set boot_id = excluded.boot_id, offset_ms = excluded.offset_ms;

-- name: shift_retries
-- Retries wait for a time to pass, wherever the wall clock was put; due times of messages do not.
update duly_parked set due_ms = due_ms + ? where due_ms is not null and error is not null;


-- ===== settling ===============================================================================

-- name: add_free_range
insert into duly_claims (subscription_no, first, last, attempt, alone, repeated, replays)
values (?, ?, ?, ?, ?, ?, ?);

-- name: park_retry
insert into duly_parked (
    subscription_no, position, key, due_ms, attempt, alone, repeated, error, replays
)
select ?1, position, key, ?3, ?4, 0, 1, ?5, ?6 from duly_messages where position = ?2;

-- name: park_unstarted
-- What no handler was called with: it comes again as it was.
insert into duly_parked (
    subscription_no, position, key, due_ms, attempt, alone, repeated, error, replays
)
select ?1, position, key, ?3, ?4, ?5, ?6, ?7, ?8 from duly_messages where position = ?2;

-- name: bury
insert into duly_dead (
    subscription_no, position, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms, replays
)
select ?1, m.position, t.name, m.source, m.id, m.key, m.time_ms, m.headers, m.due_ms, m.body,
    ?3, ?4, ?5, ?6
from duly_messages m
    join duly_streams s on s.stream = (m.position >> 40)
    join duly_topics t on t.topic_no = s.topic_no
where m.position = ?2;

-- name: anyone_behind
select exists (select 1 from duly_parked where subscription_no = ? and due_ms is null);

-- name: keys_behind
-- For each key with messages in the range: the first that waits behind another of it.
select min(p.position) from duly_messages m join duly_parked p
    on p.subscription_no = ?1 and p.key = m.key and p.position > m.position
    and p.position < ?4
where m.position between ?2 and ?3 and m.key is not null group by m.key;

-- name: promote
-- It is first of its key now, as far as settling can tell; claims look again.
update duly_parked set due_ms = coalesce(
    (select m.due_ms from duly_messages m where m.position = duly_parked.position), 0
)
where subscription_no = ? and position = ? and due_ms is null;


-- ===== dead letters, brought back or removed ===================================================

-- name: is_dead
select exists (select 1 from duly_dead where dead_id = ?);

-- name: restore
-- The log may have forgotten it meanwhile. Positions are never reused: what stands there is it.
insert into duly_messages (position, source, id, key, time_ms, headers, due_ms, body)
select position, source, id, key, time_ms, headers, due_ms, body from duly_dead where dead_id = ?
on conflict (position) do nothing;

-- name: park_replayed
-- Due at once, as if it had never been given out.
insert into duly_parked (
    subscription_no, position, key, due_ms, attempt, alone, repeated, replays
)
select subscription_no, position, key, 0, 1, 0, 0, replays + 1 from duly_dead where dead_id = ?;

-- name: promote_behind
-- Of what waits for this one, the first may go on; claims put the others behind that again.
update duly_parked set due_ms = coalesce(
    (select m.due_ms from duly_messages m where m.position = duly_parked.position), 0
)
where due_ms is null and (subscription_no, key, position >> 40) in (
    select d.subscription_no, d.key, d.position >> 40 from duly_dead d where d.dead_id = ?
);

-- name: note_dead
insert into duly_incidents (
    time_ms, kind, topic, subscription, source, id, position, count, worker, detail
)
select ?2, ?3, d.topic, u.name, cast(d.source as text), cast(d.id as text), d.position, 1, null,
    ?4 || d.attempts || ': ' || d.error
from duly_dead d join duly_subscriptions u on u.subscription_no = d.subscription_no
where d.dead_id = ?1;

-- name: exhume
delete from duly_dead where dead_id = ?;


-- ===== schedules ==============================================================================

-- name: reached_tick
select tick_ms from duly_schedules where name = ?;

-- name: reached_ticks
select name, tick_ms from duly_schedules;

-- name: start_schedule
insert into duly_schedules (name, tick_ms) values (?, ?) on conflict do nothing;

-- name: move_tick
-- Compare and set: another process that was first makes this change nothing.
update duly_schedules set tick_ms = ?3 where name = ?1 and tick_ms = ?2 returning 1;


-- ===== incidents ==============================================================================

-- name: note
insert into duly_incidents (
    time_ms, kind, topic, subscription, source, id, position, count, worker, detail
) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: note_position
-- An incident of one message of a subscription, found by its position. What is claimed is in the
-- log unless it was erased: then nothing of it is to be kept, nor what its handler said of it.
insert into duly_incidents (
    time_ms, kind, topic, subscription, source, id, position, count, worker, detail
)
select ?1, ?2,
    (select t.name from duly_streams s join duly_topics t on t.topic_no = s.topic_no
     where s.stream = (?4 >> 40)),
    (select name from duly_subscriptions where subscription_no = ?3),
    (select m.source from duly_messages m where m.position = ?4),
    (select m.id from duly_messages m where m.position = ?4),
    ?4, ?5, ?6,
    case when ?2 in ('retry', 'dead-letter')
        and not exists (select 1 from duly_messages m where m.position = ?4)
    then 'erased' else ?7 end;


-- ===== retention ==============================================================================

-- name: all_streams
select s.stream, t.retention_s from duly_streams s join duly_topics t on t.topic_no = s.topic_no
where exists (select 1 from duly_cursors c where c.stream = s.stream) order by s.stream;

-- name: low_water
-- Below it every subscription of the stream has settled or parked all.
select min(at) from (
    select (?1 << 40) | min(next_seq) as at from duly_cursors where stream = ?1
    union all
    select min(first) from duly_claims where (first >> 40) = ?1
);

-- name: first_kept
-- And when it was made: the log is nearly in the order of time.
select position, time_ms from duly_messages where position >= ? and position < ?
order by position limit 1;

-- name: any_parked
select exists (
    select 1 from duly_parked p join duly_cursors c
        on p.subscription_no = c.subscription_no and c.stream = ?3
    where p.position between ?1 and ?2
);

-- name: trim_all
delete from duly_messages where position between ? and ? and time_ms <= ?;

-- name: trim
-- Parked ones stay: a message that waits for long does not keep those around it. The cross join
-- keeps the planner from looking through all that is parked, once for each message.
delete from duly_messages where position between ?1 and ?2 and time_ms <= ?3
and not exists (
    select 1 from duly_cursors c cross join duly_parked p
        on p.subscription_no = c.subscription_no and p.position = duly_messages.position
    where c.stream = ?4
);

-- name: identities_after
-- The end of the next stretch of identities to look at.
select topic_no, source, id from duly_identities
where (topic_no, source, id) > (?1, ?2, ?3) order by topic_no, source, id limit 1 offset ?4;

-- name: forget_old
delete from duly_identities
where (topic_no, source, id) > (?1, ?2, ?3) and (topic_no, source, id) <= (?4, ?5, ?6)
and time_ms < ?7 - 1000 * (
    select identity_retention_s from duly_topics t where t.topic_no = duly_identities.topic_no
);

-- name: forget_incidents
-- The oldest, where they are too old or too many.
delete from duly_incidents where incident_id in (
    select incident_id from duly_incidents
    where time_ms < ?1 or incident_id <= (select max(incident_id) from duly_incidents) - ?2
    order by incident_id limit ?3
);


-- ===== looking inside =========================================================================

-- name: subscription_states
select u.name, t.name,
    sum(s.next_seq - c.next_seq) + coalesce(sum((
        select sum(f.last - f.first + 1) from duly_claims f
        where f.subscription_no = u.subscription_no and f.token is null
        and (f.first >> 40) = s.stream
    )), 0),
    coalesce(sum((
        select sum(o.last - o.first + 1) from duly_claims o
        where o.subscription_no = u.subscription_no and o.token is not null
        and (o.first >> 40) = s.stream
    )), 0),
    coalesce(sum((
        select count(*) from duly_parked p where p.subscription_no = u.subscription_no
        and p.position >= (s.stream << 40) and p.position < ((s.stream + 1) << 40)
    )), 0),
    (select count(*) from duly_dead d where d.subscription_no = u.subscription_no)
from duly_subscriptions u
    join duly_cursors c on c.subscription_no = u.subscription_no
    join duly_streams s on s.stream = c.stream
    join duly_topics t on t.topic_no = s.topic_no
group by u.subscription_no order by u.name, t.name;

-- name: all_holders
select o.worker, u.name, t.name, sum(o.last - o.first + 1)
from duly_claims o
    join duly_subscriptions u on u.subscription_no = o.subscription_no
    join duly_topics t on t.topic_no = u.topic_no
where o.token is not null group by u.name, t.name, o.worker order by u.name, t.name, o.worker;

-- name: oldest
-- Of each subscription and stream: the first after the cursor, and the oldest claimed or parked.
select u.name, t.name, min(
    coalesce((
        select m.time_ms from duly_messages m
        where m.position >= (c.stream << 40 | c.next_seq) and m.position < ((c.stream + 1) << 40)
        order by m.position limit 1
    ), 1 << 62),
    coalesce((
        select min(m.time_ms) from duly_claims f join duly_messages m on m.position = f.first
        where f.subscription_no = u.subscription_no and (f.first >> 40) = c.stream
    ), 1 << 62),
    coalesce((
        select min(m.time_ms) from duly_parked p join duly_messages m on m.position = p.position
        where p.subscription_no = u.subscription_no
        and p.position >= (c.stream << 40) and p.position < ((c.stream + 1) << 40)
    ), 1 << 62)
)
from duly_subscriptions u
    join duly_cursors c on c.subscription_no = u.subscription_no
    join duly_topics t on t.topic_no = u.topic_no;

-- name: dead_letters
select u.name, d.topic, cast(d.source as blob), cast(d.id as blob), cast(d.key as blob),
    d.time_ms, cast(d.headers as blob), d.due_ms, d.body,
    d.error, d.attempts, d.dead_ms, d.dead_id, d.replays
from duly_dead d join duly_subscriptions u on u.subscription_no = d.subscription_no
where (?1 is null or u.name = ?1) and (?2 is null or d.topic = ?2) and (?3 is null or d.id = ?3)
and (?4 is null or instr(d.error, ?4)) and (?5 is null or d.dead_ms >= ?5)
and (?6 is null or d.dead_ms < ?6) and (?7 is null or d.dead_id < ?7)
order by d.dead_id desc limit ?8;

-- name: incidents
select time_ms, kind, topic, subscription, source, id, position, count, worker, detail
from duly_incidents
where (?1 is null or subscription = ?1) and (?2 is null or kind = ?2)
order by incident_id desc limit ?3;

-- name: incident_counts
select coalesce(subscription, topic, ''), kind, sum(count) from duly_incidents group by 1, 2;
