-- Every statement of duly's log on PostgreSQL. `duly.` stands for the schema it lies in.
--
-- Two orders. A message is stored at a *place*: places come from a sequence, so that publishers
-- never wait for each other, and a transaction that commits late fills a place that others are
-- past. It is delivered at a *position*, (stream << 40) | seq, without gaps, which a *tick* gives
-- it once its transaction is over (`ticks.py` says why that loses nothing). `runs` maps the one to
-- the other, a row for each publish and stream. Everything else goes by position, as on SQLite.


-- ===== tables =================================================================================

-- name: create_log
-- Times: milliseconds since 1970 UTC by the server's clock, save what a message itself says.
create sequence if not exists duly.batches;
create sequence if not exists duly.tokens;
create sequence if not exists duly.workers;

-- Who ticks holds the advisory lock of this table. The latest row is the one that counts; rows
-- are added and not changed, for versions of one row pile up under a held snapshot.
create table if not exists duly.ticks (
    tick_no bigint primary key,
    snapshot pg_snapshot not null,
    -- The cluster whose transaction ids these are.
    system_identifier bigint not null
);

-- Before the first transaction that wrote anything here.
insert into duly.ticks (tick_no, snapshot, system_identifier)
select 0, '1:1:'::pg_snapshot, system_identifier from pg_control_system()
on conflict do nothing;

-- By how much the server's clock was ahead of the time that leases go by when somebody last looked.
create table if not exists duly.clock (
    only_row integer primary key check (only_row = 1),
    boot_id text not null,
    offset_ms bigint not null
);

insert into duly.clock values (1, 'server', 0) on conflict do nothing;

-- partitions 0: no order, one stream.
create table if not exists duly.topics (
    topic_no bigint generated always as identity primary key,
    name text not null unique,
    exactly_once boolean not null,
    partitions integer not null,
    retention_s double precision not null,
    identity_retention_s double precision not null
);

create table if not exists duly.streams (
    stream bigint generated always as identity primary key,
    topic_no bigint not null references duly.topics,
    partition integer not null,
    unique (topic_no, partition)
);

create table if not exists duly.messages (
    place bigint primary key,
    time_ms bigint not null,
    due_ms bigint,
    source text not null,
    id text not null,
    key text,
    headers text,
    body bytea not null
);

-- Compressing costs more than it saves on what mostly is small or compressed already.
alter table duly.messages alter body set storage external;

-- What was published and has no position yet: a row for each publish and stream.
create table if not exists duly.arrivals (
    xid xid8 not null default pg_current_xact_id(),
    stream bigint not null,
    place bigint not null,
    count integer not null,
    largest integer not null,
    latest_due_ms bigint not null
);

create index if not exists arrivals_xid on duly.arrivals (xid);

-- The messages of positions position..position + count - 1 lie at place and after it.
-- largest, latest_due_ms: of the stream up to here, which spares claims to measure.
create table if not exists duly.runs (
    position bigint primary key,
    place bigint not null,
    count integer not null,
    largest integer not null,
    latest_due_ms bigint not null
);

-- What exactly-once topics remember to drop repeats, kept apart from the log.
create table if not exists duly.identities (
    topic_no bigint not null,
    time_ms bigint not null,
    place bigint not null,
    source text not null,
    id text not null,
    hash bytea not null,
    primary key (topic_no, source, id)
);

-- One row a topic: a lane sees only the topics it asks for, whatever else the name once had.
create table if not exists duly.subscriptions (
    subscription_no integer generated always as identity primary key,
    name text not null,
    topic_no bigint not null references duly.topics,
    guarantee text not null,
    order_by_key boolean not null,
    hold_key_on_dead boolean not null,
    unique (name, topic_no)
);

-- Everything of the stream before the largest next_seq was given out, parked or settled once.
create table if not exists duly.cursors (
    subscription_no integer not null,
    stream bigint not null,
    next_seq bigint not null,
    primary key (subscription_no, stream, next_seq)
);

-- One row a contiguous range of unsettled messages. token null: nobody's, to be given out again.
-- alone 1: one at a time, for a death of its holder has to be charged to somebody.
-- alone 2: was claimed by a call for one message.
create table if not exists duly.claims (
    claim_id bigint generated always as identity primary key,
    subscription_no integer not null,
    first bigint not null,
    last bigint not null,
    attempt integer not null,
    alone integer not null,
    repeated integer not null,
    replays integer not null default 0,
    token bigint,
    worker text,
    lane integer,
    boot_id text,
    lease_until_boot_ms bigint,
    mark bigint
);

create index if not exists claims_token on duly.claims (token) where token is not null;

create index if not exists claims_held on duly.claims (subscription_no, token)
where token is not null;

create index if not exists claims_free on duly.claims (subscription_no, first)
where token is null;

-- Those that wait: for a retry, for their due time, or (due_ms null) behind another of their key.
create table if not exists duly.parked (
    subscription_no integer not null,
    position bigint not null,
    key text,
    due_ms bigint,
    attempt integer not null,
    alone integer not null,
    repeated integer not null,
    replays integer not null default 0,
    error text,
    primary key (subscription_no, position)
);

create index if not exists parked_due on duly.parked (subscription_no, due_ms);

create index if not exists parked_key on duly.parked (subscription_no, key, position);

-- A full copy: the log forgets a message once every subscription is done with it.
create table if not exists duly.dead (
    dead_id bigint generated always as identity primary key,
    subscription_no integer not null,
    position bigint not null,
    place bigint not null,
    topic text not null,
    source text,
    id text,
    key text,
    time_ms bigint,
    headers text,
    due_ms bigint,
    body bytea,
    error text not null,
    attempts integer not null,
    dead_ms bigint not null,
    replays integer not null default 0
);

create index if not exists dead_key on duly.dead (subscription_no, key, position);

-- What was not plain success. count > 1: as many messages, from position on.
create table if not exists duly.incidents (
    incident_id bigint generated always as identity primary key,
    time_ms bigint not null,
    kind text not null,
    topic text,
    subscription text,
    source text,
    id text,
    position bigint,
    count bigint not null,
    worker text,
    detail text not null
);

-- Subscriptions that people hold back. under: rewinding, or of a name that was given up (with
-- the number behind a #) removing or removed; null: only paused.
create table if not exists duly.steering (
    name text primary key,
    paused boolean not null default false,
    under text,
    since_ms bigint not null
);

-- The lives that a subscription was declared to begin, each once.
create table if not exists duly.epochs (
    name text not null,
    epoch text not null,
    time_ms bigint not null,
    primary key (name, epoch)
);

-- Of identities whose message a person had erased only a hash, which drops a repeat.
create table if not exists duly.erased (
    topic_no bigint not null,
    hash bytea not null,
    time_ms bigint not null,
    primary key (topic_no, hash)
);

-- Up to which tick a schedule has published.
create table if not exists duly.schedules (
    name text primary key,
    tick_ms bigint not null
);

-- What the workers are called whose numbers are locked by their sessions.
create table if not exists duly.attendance (
    number bigint primary key,
    name text not null
);

-- How far each subscription was given out.
create or replace view duly.reached as
select subscription_no, stream, max(next_seq) as next_seq
from duly.cursors group by subscription_no, stream;

-- Messages with their positions, null for those that have none yet. For who looks through all of
-- the log: a run lies within one block of places.
create or replace view duly.located as
select m.place, l.position + m.place - l.place as position, l.stream, m.time_ms, m.due_ms,
    m.source, m.id, m.key, m.headers, m.body
from duly.messages m join (
    select place, count, position, position >> 40 as stream from duly.runs
    union all
    select place, count, null, stream from duly.arrivals
) l on (l.place >> 16) = (m.place >> 16) and m.place >= l.place and m.place < l.place + l.count;

-- What is left of an identity whose message was erased; as `publishing.identity_hash`.
create or replace function duly.identity_hash(topic text, source text, id text) returns bytea
language sql immutable as $$
    select sha256(
        convert_to(topic, 'UTF8') || '\x00'::bytea || convert_to(source, 'UTF8')
        || '\x00'::bytea || convert_to(id, 'UTF8')
    )
$$;

-- Where the message of a position lies; null where the log has forgotten.
create or replace function duly.place_of(bigint) returns bigint language sql stable as $$
    select r.place + ($1 - r.position) from (
        select position, place, count from duly.runs where position <= $1
        order by position desc limit 1
    ) r where $1 < r.position + r.count
$$;

-- The messages of positions from first to last. A run's own are found by the index on places,
-- which the limit insists on: without it the planner may go through the whole log for them.
create or replace function duly.stretch(first bigint, last bigint) returns table (
    "position" bigint, place bigint, time_ms bigint, due_ms bigint,
    source text, id text, key text, headers text, body bytea
) language sql stable as $$
    select r.position + m.place - r.place, m.place, m.time_ms, m.due_ms,
        m.source, m.id, m.key, m.headers, m.body
    from duly.runs r cross join lateral (
        select * from duly.messages
        where messages.place >= r.place + greatest($1 - r.position, 0)
        and messages.place < r.place + least($2 + 1 - r.position, r.count)
        order by messages.place limit r.count
    ) m
    where r.position >= coalesce((select max(p.position) from duly.runs p where p.position <= $1), $1)
    and r.position <= $2
$$;


-- ===== one at a time ==========================================================================
-- Each lock is taken by a statement of its own, so that the next one's snapshot is a later one.

-- name: lock_ticks
-- What nobody ticked for weeks may take its time.
select set_config('statement_timeout', '3600s', true),
    pg_advisory_xact_lock('duly.ticks'::regclass::oid::int, 0);

-- name: lock_topics
select pg_advisory_xact_lock('duly.topics'::regclass::oid::int, 0);

-- name: lock_subscription
select pg_advisory_xact_lock('duly.subscriptions'::regclass::oid::int, $1::int);

-- name: lock_dead
-- The subscriptions of some dead letters.
select pg_advisory_xact_lock('duly.subscriptions'::regclass::oid::int, s.subscription_no)
from (
    select distinct subscription_no from duly.dead where dead_id = any ($1::bigint[])
    order by subscription_no
) s;

-- name: lock_retention
-- One sweep at a time.
select pg_try_advisory_xact_lock('duly.messages'::regclass::oid::int, 0);

-- name: await_retention
-- No sweep until this transaction ends: it takes away messages that nobody needs, and cursors that
-- later ones have taken the place of.
select pg_advisory_xact_lock('duly.messages'::regclass::oid::int, 0);


-- ===== ticks ==================================================================================

-- name: last_tick
-- Whose transaction ids the latest tick goes by.
select system_identifier from duly.ticks order by tick_no desc limit 1;

-- name: arrived
-- Whether a tick would find anything; only reads.
select exists (
    select 1 from duly.arrivals a where a.xid = any (array(
        select pg_snapshot_xip(t.snapshot) from (
            select snapshot from duly.ticks order by tick_no desc limit 1
        ) t
    ))
) or exists (
    select 1 from duly.arrivals a where a.xid >= (
        select pg_snapshot_xmax(snapshot) from duly.ticks order by tick_no desc limit 1
    )
);

-- name: tick
-- Give positions to what is visible now and was not in the snapshot of the last tick.
with last as (
    select tick_no, snapshot from duly.ticks where system_identifier = $1::bigint
    order by tick_no desc limit 1
),
late as (
    delete from duly.arrivals
    where xid = any (array(select pg_snapshot_xip(snapshot) from last))
    returning stream, place, count, largest, latest_due_ms
),
fresh as (
    delete from duly.arrivals where xid >= (select pg_snapshot_xmax(snapshot) from last)
    returning stream, place, count, largest, latest_due_ms
),
settled as (select * from late union all select * from fresh),
-- Where each of their streams ends so far. Of the latest run this is what all of them come to.
ends as (
    select s.stream, coalesce(r.position + r.count, s.stream << 40 | 1) as position,
        coalesce(r.largest, 0) as largest, coalesce(r.latest_due_ms, 0) as latest_due_ms
    from (select distinct stream from settled) s left join lateral (
        select * from duly.runs where position >= s.stream << 40
        and position < (s.stream + 1) << 40 order by position desc limit 1
    ) r on true
),
added as (
    insert into duly.runs (position, place, count, largest, latest_due_ms)
    select e.position + sum(s.count) over before - s.count, s.place, s.count,
        greatest(e.largest, max(s.largest) over before),
        greatest(e.latest_due_ms, max(s.latest_due_ms) over before)
    from settled s join ends e on e.stream = s.stream
    window before as (partition by s.stream order by s.place)
    returning 1
),
noted as (
    insert into duly.ticks (tick_no, snapshot, system_identifier)
    select tick_no + 1, pg_current_snapshot(), $1::bigint from last
    where exists (select 1 from settled)
)
select count(*) from added;

-- name: adopt
-- Give positions to whatever has none, by no snapshot at all, and go by this server from now on.
with settled as (
    delete from duly.arrivals returning stream, place, count, largest, latest_due_ms
),
ends as (
    select s.stream, coalesce(r.position + r.count, s.stream << 40 | 1) as position,
        coalesce(r.largest, 0) as largest, coalesce(r.latest_due_ms, 0) as latest_due_ms
    from (select distinct stream from settled) s left join lateral (
        select * from duly.runs where position >= s.stream << 40
        and position < (s.stream + 1) << 40 order by position desc limit 1
    ) r on true
),
added as (
    insert into duly.runs (position, place, count, largest, latest_due_ms)
    select e.position + sum(s.count) over before - s.count, s.place, s.count,
        greatest(e.largest, max(s.largest) over before),
        greatest(e.latest_due_ms, max(s.latest_due_ms) over before)
    from settled s join ends e on e.stream = s.stream
    window before as (partition by s.stream order by s.place)
)
insert into duly.ticks (tick_no, snapshot, system_identifier)
select coalesce((select max(tick_no) from duly.ticks), 0) + 1, pg_current_snapshot(),
    system_identifier
from pg_control_system();

-- name: forget_ticks
delete from duly.ticks where tick_no < (select max(tick_no) from duly.ticks) - 100;


-- ===== topics =================================================================================

-- name: find_topic
select topic_no, exactly_once, partitions from duly.topics where name = $1::text;

-- name: topic_as_declared
-- A row where it is there and nothing about it has to change.
select 1 from duly.topics where name = $1::text and exactly_once = $2 and partitions = $3
and retention_s = $4::double precision and identity_retention_s = $5::double precision;

-- name: add_topic
insert into duly.topics (name, exactly_once, partitions, retention_s, identity_retention_s)
values ($1, $2, $3, $4, $5) returning topic_no;

-- name: update_topic
update duly.topics set retention_s = $1, identity_retention_s = $2
where topic_no = $3 and (retention_s, identity_retention_s) is distinct from ($1, $2);

-- name: add_stream
insert into duly.streams (topic_no, partition) values ($1, $2);

-- name: streams_of_topic
select stream from duly.streams where topic_no = $1 order by partition;


-- ===== publishing =============================================================================

-- name: publish
-- Messages in the order of their streams. Nothing here waits for another publisher.
with block as materialized (select nextval('duly.batches') << 16 as place /* alone */),
rows as materialized (
    select * from unnest(
        $1::bigint[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[],
        $7::bigint[], $8::bytea[]
    ) with ordinality as r (stream, source, id, key, time_ms, headers, due_ms, body, n)
),
arrived as (
    insert into duly.arrivals (stream, place, count, largest, latest_due_ms)
    select r.stream, b.place + min(r.n) - 1, count(*), max(octet_length(r.body)),
        coalesce(max(r.due_ms), 0)
    from rows r, block b group by r.stream, b.place
)
insert into duly.messages (place, source, id, key, time_ms, headers, due_ms, body)
select b.place + r.n - 1, r.source, r.id, r.key, r.time_ms, r.headers, r.due_ms, r.body
from rows r, block b order by r.n;

-- name: publish_once
-- The same, of those whose identity is new. Sorted, so that two publishers do not deadlock; one
-- that finds an identity of an open transaction waits until that is over.
with block as materialized (select nextval('duly.batches') << 16 as place /* alone */),
rows as materialized (
    select * from unnest(
        $3::bigint[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::text[],
        $9::bigint[], $10::bytea[], $11::bytea[]
    ) with ordinality as r (stream, source, id, key, time_ms, headers, due_ms, body, hash, n)
),
remembered as (
    insert into duly.identities (topic_no, source, id, hash, place, time_ms)
    select $1::bigint, r.source, r.id, r.hash, b.place + r.n - 1, $2::bigint
    from rows r, block b
    -- Nothing is erased, mostly, and then no hash is computed.
    where not (
        exists (select 1 from duly.erased e where e.topic_no = $1::bigint)
        and exists (
            select 1 from duly.topics t join duly.erased e on e.topic_no = t.topic_no
                and e.hash = duly.identity_hash(t.name, r.source, r.id)
            where t.topic_no = $1::bigint
        )
    )
    order by r.source, r.id, r.n
    on conflict do nothing returning place
),
fresh as materialized (
    select r.*, b.place + row_number() over (order by r.n) - 1 as place
    from remembered m, rows r, block b where m.place = b.place + r.n - 1
),
arrived as (
    insert into duly.arrivals (stream, place, count, largest, latest_due_ms)
    select f.stream, min(f.place), count(*), max(octet_length(f.body)),
        coalesce(max(f.due_ms), 0)
    from fresh f group by f.stream
)
insert into duly.messages (place, source, id, key, time_ms, headers, due_ms, body)
select f.place, f.source, f.id, f.key, f.time_ms, f.headers, f.due_ms, f.body
from fresh f order by f.n;

-- name: known_identity
-- The hash that an identity has, and which message of the latest publish here it came with.
select i.hash, i.place - (currval('duly.batches') << 16)
from unnest($1::bigint[], $2::text[], $3::text[]) with ordinality as r (topic_no, source, id, n)
    left join duly.identities i
        on i.topic_no = r.topic_no and i.source = r.source and i.id = r.id
order by r.n;


-- ===== subscribing ============================================================================

-- name: find_subscription
select topic_no, subscription_no, guarantee from duly.subscriptions where name = $1::text;

-- name: add_subscription
insert into duly.subscriptions (name, topic_no, guarantee, order_by_key, hold_key_on_dead)
values ($1, $2, $3, $4, $5) returning subscription_no;

-- name: update_subscription
update duly.subscriptions set order_by_key = $1, hold_key_on_dead = $2
where subscription_no = $3 and (order_by_key, hold_key_on_dead) is distinct from ($1, $2);

-- name: streams_without_cursor
select s.stream, coalesce((
    select r.position + r.count - (s.stream << 40) from duly.runs r
    where r.position >= s.stream << 40 and r.position < (s.stream + 1) << 40
    order by r.position desc limit 1
), 1)
from duly.streams s
where s.topic_no = $2::bigint and not exists (
    select 1 from duly.cursors c where c.subscription_no = $1::int and c.stream = s.stream
) order by s.stream;

-- name: add_cursor
insert into duly.cursors (subscription_no, stream, next_seq) values ($1, $2, $3);

-- name: first_position
-- The oldest kept position of a range made at or after a time.
select r.position + m.place - r.place from duly.runs r cross join lateral (
    select place from duly.messages
    where place >= r.place + greatest($1::bigint - r.position, 0)
    and place < r.place + least($2::bigint + 1 - r.position, r.count)
    and time_ms >= $3::bigint
    order by place limit 1
) m
where r.position >= coalesce(
    (select max(p.position) from duly.runs p where p.position <= $1::bigint), $1::bigint
) and r.position <= $2::bigint
order by r.position limit 1;

-- name: unpark_behind
-- What waits behind another is due; claims look again whether it still has to wait.
update duly.parked set due_ms = 0 where subscription_no = $1 and due_ms is null;


-- ===== claiming ===============================================================================
-- Held claims are looked for from a token on below which there are none: what was settled stays
-- in the way as long as anybody holds a snapshot.

-- name: outlook
-- Whether people hold the subscription back, whether a range is nobody's, and when the next parked
-- message is due; with each stream of messages that were never given out, or nulls.
select
    exists (
        select 1 from duly.steering h join duly.subscriptions n on n.name = h.name
        where n.subscription_no = $1::int
    ),
    exists (select 1 from duly.claims where token is null and subscription_no = $1::int),
    (select min(due_ms) from duly.parked where subscription_no = $1::int and due_ms is not null),
    b.stream, b.next_seq, b.end_seq, b.largest, b.latest_due_ms
from (values (1)) one left join (
    select c.stream, c.next_seq, e.next_seq as end_seq, e.largest, e.latest_due_ms
    from duly.subscriptions u join duly.streams s on s.topic_no = u.topic_no
        join lateral (
            select * from duly.cursors c
            where c.subscription_no = u.subscription_no and c.stream = s.stream
            order by c.next_seq desc limit 1
        ) c on true
        join lateral (
            select r.position + r.count - (s.stream << 40) as next_seq, r.largest, r.latest_due_ms
            from duly.runs r
            where r.position >= s.stream << 40 and r.position < (s.stream + 1) << 40
            order by r.position desc limit 1
        ) e on e.next_seq > c.next_seq
    where u.subscription_no = $1::int
) b on true;

-- name: outlook_ordered
-- The same in order by key: a stream that is being worked has nothing to give, and one with
-- claims no fresh messages.
select
    exists (
        select 1 from duly.steering h join duly.subscriptions n on n.name = h.name
        where n.subscription_no = $1::int
    ),
    exists (
        select 1 from duly.claims f where f.token is null and f.subscription_no = $1::int
        and not exists (
            select 1 from duly.claims o where o.subscription_no = $1::int
            and o.token >= $2::bigint and (o.first >> 40) = (f.first >> 40)
        )
    ),
    (
        select p.due_ms from duly.parked p
        where p.subscription_no = $1::int and p.due_ms is not null
        and (p.position >> 40) not in (
            select o.first >> 40 from duly.claims o
            where o.subscription_no = $1::int and (o.token >= $2::bigint or o.token is null)
        )
        order by p.due_ms limit 1
    ),
    b.stream, b.next_seq, b.end_seq, b.largest, b.latest_due_ms
from (values (1)) one left join (
    select c.stream, c.next_seq, e.next_seq as end_seq, e.largest, e.latest_due_ms
    from duly.subscriptions u join duly.streams s on s.topic_no = u.topic_no
        join lateral (
            select * from duly.cursors c
            where c.subscription_no = u.subscription_no and c.stream = s.stream
            order by c.next_seq desc limit 1
        ) c on true
        join lateral (
            select r.position + r.count - (s.stream << 40) as next_seq, r.largest, r.latest_due_ms
            from duly.runs r
            where r.position >= s.stream << 40 and r.position < (s.stream + 1) << 40
            order by r.position desc limit 1
        ) e on e.next_seq > c.next_seq
    where u.subscription_no = $1::int and s.stream not in (
        select o.first >> 40 from duly.claims o
        where o.subscription_no = $1::int and (o.token >= $2::bigint or o.token is null)
    )
) b on true;

-- name: claim_fresh
-- The next messages of the one stream that has any, where nothing else could be claimed; else no
-- row, and nothing is claimed. Bodies go as one value beside their sizes, which costs a fraction of
-- a row for each; ids only where they are wanted.
with seen as materialized (
    select s.stream, c.next_seq, e.next_seq as end_seq, e.largest, e.latest_due_ms
    from duly.subscriptions u join duly.streams s on s.topic_no = u.topic_no
        join lateral (
            select * from duly.cursors c
            where c.subscription_no = u.subscription_no and c.stream = s.stream
            order by c.next_seq desc limit 1
        ) c on true
        join lateral (
            select r.position + r.count - (s.stream << 40) as next_seq, r.largest, r.latest_due_ms
            from duly.runs r
            where r.position >= s.stream << 40 and r.position < (s.stream + 1) << 40
            order by r.position desc limit 1
        ) e on e.next_seq > c.next_seq
    where u.subscription_no = $1::int
    and not exists (
        select 1 from duly.steering h join duly.subscriptions n on n.name = h.name
        where n.subscription_no = $1::int
    )
    and not exists (
        select 1 from duly.claims where token is null and subscription_no = $1::int
    )
    and not exists (
        select 1 from duly.parked where subscription_no = $1::int and due_ms <= $4::bigint
    )
),
chosen as materialized (
    select s.stream, (s.stream << 40) + s.next_seq as first, s.largest,
        (s.stream << 40) + least(s.end_seq, s.next_seq + $2::int) - 1 as last
    from seen s where (select count(*) from seen) = 1 and s.latest_due_ms <= $4::bigint
    and least(s.end_seq - s.next_seq, $2::int) * s.largest::bigint <= $3::bigint
),
found as materialized (
    select c.*, b.* from chosen c cross join lateral (
        select count(*) as count,
            string_agg(int4send(octet_length(m.body)), '') as sizes,
            string_agg(m.body, '') as bodies,
            (json_agg(m.id) filter (where $10::boolean))::text as ids,
            min(m.source) filter (where $10::boolean) as source,
            max(m.source) filter (where $10::boolean) as greatest
        from (
            select * from duly.stretch(c.first, c.last) m order by m.position
        ) m
    ) b where b.count = c.last - c.first + 1
),
given as materialized (select nextval('duly.tokens') as token from found),
claimed as (
    insert into duly.claims (
        subscription_no, first, last, attempt, alone, repeated, replays,
        token, worker, lane, boot_id, lease_until_boot_ms
    )
    select $1::int, f.first, f.last, 1, $5::int, 0, 0, g.token, $6::text, $7::int, $8::text,
        $9::bigint
    from found f, given g
),
moved as (
    insert into duly.cursors (next_seq, subscription_no, stream)
    select f.last + 1 - (f.stream << 40), $1::int, f.stream from found f
)
select g.token, f.stream, f.first, f.last, f.largest, f.sizes, f.bodies, f.ids, f.source,
    f.greatest
from found f, given g;

-- name: measure
select coalesce(sum(octet_length(m.body)), 0)::bigint from duly.stretch($1::bigint, $2::bigint) m;

-- name: sizes
select m.position, octet_length(m.body)
from duly.stretch($1::bigint, $2::bigint) m order by m.position;

-- name: fetch
select m.position, m.source, m.id, m.time_ms, m.key, m.headers, m.due_ms, m.body
from duly.stretch($1::bigint, $2::bigint) m order by m.position;

-- name: fetch_raw
-- The same: text is text here.
select m.position, m.source, m.id, m.time_ms, m.key, m.headers, m.due_ms, m.body
from duly.stretch($1::bigint, $2::bigint) m order by m.position;

-- name: fetch_span
-- For handlers that look at nothing else, where the range has no gaps.
select m.body from duly.stretch($1::bigint, $2::bigint) m order by m.position;

-- name: fetch_ids
select convert_to(m.id, 'UTF8') from duly.stretch($1::bigint, $2::bigint) m order by m.position;

-- name: fetch_span_with_identities
select m.source, m.id, m.body from duly.stretch($1::bigint, $2::bigint) m order by m.position;

-- name: ids_of_span
-- As one JSON text, which costs a fraction of a row for each.
select json_agg(m.id order by m.position)::text from duly.stretch($1::bigint, $2::bigint) m;

-- name: identities_of_span
-- The same with the least and the greatest source, which nearly always are one.
select json_agg(m.id order by m.position)::text, min(m.source), max(m.source)
from duly.stretch($1::bigint, $2::bigint) m;

-- name: fetch_bodies
select m.position, m.id, m.body from duly.stretch($1::bigint, $2::bigint) m order by m.position;

-- name: next_token
select nextval('duly.tokens');

-- name: move_cursor
insert into duly.cursors (next_seq, subscription_no, stream) values ($1, $2, $3);

-- name: add_claim
insert into duly.claims (
    subscription_no, first, last, attempt, alone, repeated, replays,
    token, worker, lane, boot_id, lease_until_boot_ms
) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12);

-- name: park_not_due
-- Messages of a fresh range that are not due yet.
insert into duly.parked (subscription_no, position, key, due_ms, attempt, alone, repeated)
select $1::int, m.position, m.key, m.due_ms, 1, 0, 0
from duly.stretch($2::bigint, $3::bigint) m where m.due_ms > $4::bigint
returning position;

-- name: has_blockers
select exists (select 1 from duly.parked where subscription_no = $1::int)
    or exists (select 1 from duly.dead where subscription_no = $1::int and $2::boolean);

-- name: park_behind
-- Messages of a range whose key has an earlier one parked, or ($9) dead and unresolved.
insert into duly.parked (
    subscription_no, position, key, due_ms, attempt, alone, repeated, replays
)
select $1::int, m.position, m.key, null, $5::int, $6::int, $7::int, $8::int
from duly.stretch($2::bigint, $3::bigint) m
where m.key is not null and (exists (
    select 1 from duly.parked p where p.subscription_no = $1::int and p.key = m.key
    and p.position >= $4::bigint and p.position < m.position
) or ($9::boolean and exists (
    select 1 from duly.dead d where d.subscription_no = $1::int and d.key = m.key
    and d.position >= $4::bigint and d.position < m.position
)))
on conflict do nothing returning position;

-- name: parked_due
select p.position, p.attempt, p.alone, p.repeated, p.due_ms, octet_length(m.body), p.replays
from (
    select * from duly.parked where subscription_no = $1::int and due_ms <= $2::bigint
    order by due_ms, position limit $3::int
) p left join lateral (
    select body from duly.messages where place = duly.place_of(p.position)
) m on true
order by p.due_ms, p.position;

-- name: put_behind
-- In order by key: what came due though an earlier one of its key is parked or dead waits on.
update duly.parked as p set due_ms = null
where p.subscription_no = $1::int and p.due_ms <= $2::bigint and p.key is not null and (
    exists (
        select 1 from duly.parked q where q.subscription_no = $1::int and q.key = p.key
        and q.position < p.position and (q.position >> 40) = (p.position >> 40)
    ) or ($3::boolean and exists (
        select 1 from duly.dead d where d.subscription_no = $1::int and d.key = p.key
        and d.position < p.position and (d.position >> 40) = (p.position >> 40)
    ))
);

-- name: parked_due_ordered
select p.position, p.attempt, p.alone, p.repeated, p.due_ms, octet_length(m.body), p.replays
from (
    select * from duly.parked p where p.subscription_no = $1::int and p.due_ms <= $2::bigint
    and (p.position >> 40) not in (
        select o.first >> 40 from duly.claims o
        where o.subscription_no = $1::int and (o.token >= $4::bigint or o.token is null)
    )
    order by p.position limit $3::int
) p left join lateral (
    select body from duly.messages where place = duly.place_of(p.position)
) m on true
order by p.position;

-- name: parked_behind
-- Those that wait behind this one, in order.
select f.position, f.attempt, f.alone, f.repeated, f.due_ms, octet_length(m.body), f.replays
from duly.parked h join duly.parked f on f.subscription_no = $1::int and f.key = h.key
    left join lateral (
        select body from duly.messages where place = duly.place_of(f.position)
    ) m on true
where h.subscription_no = $1::int and h.position = $2::bigint
and f.position > $2::bigint and (f.position >> 40) = ($2::bigint >> 40)
and not ($4::boolean and exists (
    select 1 from duly.dead d where d.subscription_no = $1::int and d.key = h.key
    and d.position < f.position and (d.position >> 40) = (f.position >> 40)
))
order by f.position limit $3::int;

-- name: unpark
delete from duly.parked p using unnest($1::int[], $2::bigint[]) as r (subscription_no, position)
where p.subscription_no = r.subscription_no and p.position = r.position;

-- name: free_ranges
-- Save the accused: these wait for a worker of their own, and keep nobody behind them waiting.
select claim_id, first, last, attempt, alone, repeated, replays from duly.claims
where token is null and subscription_no = $1::int and alone <> 3 order by first limit $2::int;

-- name: free_ranges_ordered
select f.claim_id, f.first, f.last, f.attempt, f.alone, f.repeated, f.replays from duly.claims f
where f.token is null and f.subscription_no = $1::int and f.alone <> 3
and not exists (
    select 1 from duly.claims o where o.subscription_no = $1::int and o.token >= $3::bigint
    and (o.first >> 40) = (f.first >> 40)
)
and not exists (
    select 1 from duly.claims o where o.subscription_no = $1::int and o.token is null
    and o.alone = 3 and o.first < f.first and (o.first >> 40) = (f.first >> 40)
)
order by f.first limit $2::int;

-- name: accused_ranges
select claim_id, first, last, attempt, alone, repeated, replays from duly.claims
where token is null and subscription_no = $1::int and alone = 3 order by first limit 1;

-- name: accused_ranges_ordered
select f.claim_id, f.first, f.last, f.attempt, f.alone, f.repeated, f.replays from duly.claims f
where f.token is null and f.subscription_no = $1::int and f.alone = 3
and not exists (
    select 1 from duly.claims o where o.subscription_no = $1::int
    and (o.first >> 40) = (f.first >> 40) and (o.token is not null or o.first < f.first)
)
order by f.first limit 1;

-- name: accused_waits
select exists (select 1 from duly.claims where token is null and alone = 3);

-- name: holds_anything
-- Whether this worker has claimed anything, of whichever subscription. What another lane of it is
-- just claiming is not seen yet: then the next death charges nobody, and the door closes again.
select exists (select 1 from duly.claims where token is not null and worker = $1::text);

-- name: holds_accused
-- Whether this worker still holds a message that runs with nothing beside it.
select exists (
    select 1 from duly.claims where token is not null and alone = 3
    and worker = $1::text and boot_id = $2::text and lease_until_boot_ms > $3::bigint
);

-- name: drop_whole_claim
-- Where it is still this range, stamped by this transaction ($4, null where there was no fence);
-- returns whose it was, and whether messages of its subscription wait behind others.
delete from duly.claims c
where c.token = $1::bigint and c.first = $2::bigint and c.last = $3::bigint
and ($4::bigint is null or c.mark = $4::bigint)
returning c.subscription_no, exists (
    select 1 from duly.parked p where p.subscription_no = c.subscription_no and p.due_ms is null
);

-- name: drop_whole_claim_with_turn
-- The same, and whether it has the subscription's turn from here on, which it does not wait for.
delete from duly.claims c
where c.token = $1::bigint and c.first = $2::bigint and c.last = $3::bigint
and ($4::bigint is null or c.mark = $4::bigint)
returning c.subscription_no, exists (
    select 1 from duly.parked p where p.subscription_no = c.subscription_no and p.due_ms is null
), pg_try_advisory_xact_lock('duly.subscriptions'::regclass::oid::int, c.subscription_no);

-- name: cut_range
update duly.claims set first = $1 where claim_id = $2;

-- name: drop_claim
delete from duly.claims where claim_id = $1;


-- ===== holding and losing claims ==============================================================

-- name: holders
-- Who holds claims of a subscription, and until when at the earliest.
select worker, boot_id, min(lease_until_boot_ms) from duly.claims
where subscription_no = $1::int and token >= $2::bigint group by worker, boot_id;

-- name: oldest_token
select min(token) from duly.claims where subscription_no = $1::int and token >= $2::bigint;

-- name: held_subscriptions
select distinct subscription_no from duly.claims where token is not null order by 1;

-- name: held
-- Of every subscription: what a death may be charged to is decided by all that its worker held.
-- Whoever is settling one of them, or has fenced it, holds its row: that one is not for us.
select claim_id, subscription_no, first, last, attempt, alone, worker, boot_id,
    lease_until_boot_ms
from duly.claims where token is not null order by subscription_no, first
for update skip locked;

-- name: living
-- The numbers of the workers whose sessions are there.
select objid::bigint from pg_locks
where locktype = 'advisory' and classid = 'duly.workers'::regclass and objsubid = 2
and database = (select oid from pg_database where datname = current_database());

-- name: be_alive
-- Until the session ends. False: an earlier session of this worker is not over yet.
select pg_try_advisory_lock('duly.workers'::regclass::oid::int, $1::int);

-- name: notify
-- Nothing depends on it: not worth a sync.
select set_config('synchronous_commit', 'off', true), pg_notify($1::text, $2::text);

-- name: next_worker
select nextval('duly.workers');

-- name: free_suspect
-- Nobody's, and to be given out one message at a time.
update duly.claims set token = null, worker = null, lane = null, boot_id = null,
    lease_until_boot_ms = null, mark = null, alone = $1, repeated = 1, attempt = $2
where claim_id = $3;

-- name: forget_alone
-- What a worker still holds that has lost a part: when this is lost too, perhaps to the same
-- standstill, it was not the only one.
update duly.claims set alone = case when alone in (1, 3, 4) then 4 else 0 end
where worker = $1::text and token is not null;

-- name: free_lane
-- What a closing lane holds. It may have run, though nobody settled it.
update duly.claims set token = null, worker = null, lane = null, boot_id = null,
    lease_until_boot_ms = null, mark = null, repeated = 1,
    alone = case alone when 1 then 1 when 3 then 3 when 4 then 1 else 0 end
where subscription_no = $1::int and worker = $2::text and lane = $3::int and token is not null;

-- name: pieces
select claim_id, subscription_no, first, last, attempt, alone, repeated, mark, worker, replays
from duly.claims where token = $1::bigint order by first for update;

-- name: pieces_at_rest
-- Those that nobody has fenced nor is settling; from here on nobody does until this is over.
select claim_id from duly.claims where token = $1::bigint for update skip locked;

-- name: pieces_seen
select claim_id, subscription_no, first, last, attempt, alone, repeated, mark, worker, replays
from duly.claims where token = $1::bigint order by first;

-- name: stamp_range
update duly.claims set mark = $1
where token = $2::bigint and first = $3::bigint and last = $4::bigint;

-- name: stamp
update duly.claims set mark = $1 where token = $2::bigint returning first, last;

-- name: renew
update duly.claims set lease_until_boot_ms = $1 where claim_id = $2;

-- name: split_claim
-- A further piece of the same claim.
insert into duly.claims (
    subscription_no, first, last, attempt, alone, repeated, replays,
    token, worker, lane, boot_id, lease_until_boot_ms, mark
)
select c.subscription_no, r.first, r.last, c.attempt, c.alone, c.repeated, c.replays,
    c.token, c.worker, c.lane, c.boot_id, c.lease_until_boot_ms, c.mark
from unnest($1::bigint[], $2::bigint[], $3::bigint[]) as r (claim_id, first, last)
    join duly.claims c on c.claim_id = r.claim_id;

-- name: resize_claim
update duly.claims set first = $1, last = $2 where claim_id = $3;


-- name: server_ms
select (extract(epoch from clock_timestamp()) * 1000)::bigint;

-- name: known_offset
select boot_id, offset_ms from duly.clock for update;

-- name: put_offset
insert into duly.clock values (1, $1, $2)
on conflict (only_row) do update set boot_id = excluded.boot_id, offset_ms = excluded.offset_ms;

-- name: shift_retries
-- Retries wait for a time to pass, wherever the wall clock was put; due times of messages do not.
update duly.parked set due_ms = due_ms + $1::bigint where due_ms is not null and error is not null;


-- ===== settling ===============================================================================

-- name: add_free_range
insert into duly.claims (subscription_no, first, last, attempt, alone, repeated, replays)
select * from unnest(
    $1::int[], $2::bigint[], $3::bigint[], $4::int[], $5::int[], $6::int[], $7::int[]
);

-- name: park_retry
insert into duly.parked (
    subscription_no, position, key, due_ms, attempt, alone, repeated, error, replays
)
select r.subscription_no, r.position, m.key, r.due_ms, r.attempt, 0, 1, r.error, r.replays
from unnest($1::int[], $2::bigint[], $3::bigint[], $4::int[], $5::text[], $6::int[])
    as r (subscription_no, position, due_ms, attempt, error, replays)
    join duly.messages m on m.place = duly.place_of(r.position);

-- name: park_unstarted
-- What no handler was called with: it comes again as it was.
insert into duly.parked (
    subscription_no, position, key, due_ms, attempt, alone, repeated, error, replays
)
select r.subscription_no, r.position, m.key, r.due_ms, r.attempt, r.alone, r.repeated, r.error,
    r.replays
from unnest(
        $1::int[], $2::bigint[], $3::bigint[], $4::int[], $5::int[], $6::int[], $7::text[], $8::int[]
    ) as r (subscription_no, position, due_ms, attempt, alone, repeated, error, replays)
    join duly.messages m on m.place = duly.place_of(r.position);

-- name: bury
insert into duly.dead (
    subscription_no, position, place, topic, source, id, key, time_ms, headers, due_ms, body,
    error, attempts, dead_ms, replays
)
select r.subscription_no, r.position, m.place, t.name, m.source, m.id, m.key, m.time_ms, m.headers,
    m.due_ms, m.body, r.error, r.attempts, r.dead_ms, r.replays
from unnest($1::int[], $2::bigint[], $3::text[], $4::int[], $5::bigint[], $6::int[])
    as r (subscription_no, position, error, attempts, dead_ms, replays)
    join duly.messages m on m.place = duly.place_of(r.position)
    join duly.streams s on s.stream = (r.position >> 40)
    join duly.topics t on t.topic_no = s.topic_no
order by r.position;

-- name: anyone_behind
select exists (select 1 from duly.parked where subscription_no = $1::int and due_ms is null);

-- name: keys_behind
-- For each key with messages in the range: the first that waits behind another of it.
select min(p.position) from duly.stretch($2::bigint, $3::bigint) m
    join duly.parked p on p.subscription_no = $1::int and p.key = m.key
        and p.position > m.position and p.position < $4::bigint
where m.key is not null group by m.key;

-- name: promote
-- It is first of its key now, as far as settling can tell; claims look again.
update duly.parked p set due_ms = coalesce(
    (select m.due_ms from duly.messages m where m.place = duly.place_of(p.position)), 0
)
from unnest($1::int[], $2::bigint[]) as r (subscription_no, position)
where p.subscription_no = r.subscription_no and p.position = r.position and p.due_ms is null;


-- ===== dead letters, brought back or removed ===================================================

-- name: is_dead
select exists (select 1 from duly.dead where dead_id = $1::bigint);

-- name: restore
-- The log may have forgotten it meanwhile. Places are never reused: what lies there is it.
with letters as (select * from duly.dead where dead_id = any ($1::bigint[])),
message as (
    insert into duly.messages (place, source, id, key, time_ms, headers, due_ms, body)
    select place, source, id, key, time_ms, headers, due_ms, body from letters
    on conflict (place) do nothing
)
insert into duly.runs (position, place, count, largest, latest_due_ms)
select position, place, 1, octet_length(body), 0 from letters
where duly.place_of(position) is null
on conflict (position) do nothing;

-- name: park_replayed
-- Due at once, as if it had never been given out.
insert into duly.parked (
    subscription_no, position, key, due_ms, attempt, alone, repeated, replays
)
select subscription_no, position, key, 0, 1, 0, 0, replays + 1 from duly.dead
where dead_id = any ($1::bigint[]);

-- name: promote_behind
-- Of what waits for this one, the first may go on; claims put the others behind that again.
update duly.parked p set due_ms = coalesce(
    (select m.due_ms from duly.messages m where m.place = duly.place_of(p.position)), 0
)
where due_ms is null and (subscription_no, key, position >> 40) in (
    select d.subscription_no, d.key, d.position >> 40 from duly.dead d
    where d.dead_id = any ($1::bigint[])
);

-- name: note_dead
insert into duly.incidents (
    time_ms, kind, topic, subscription, source, id, position, count, worker, detail
)
select r.time_ms, r.kind, d.topic, u.name, d.source, d.id, d.position, 1, null,
    r.detail || d.attempts || ': ' || d.error
from unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[])
    as r (dead_id, time_ms, kind, detail)
    join duly.dead d on d.dead_id = r.dead_id
    join duly.subscriptions u on u.subscription_no = d.subscription_no
order by d.dead_id;

-- name: exhume
delete from duly.dead where dead_id = any ($1::bigint[]);


-- ===== incidents ==============================================================================

-- name: note
insert into duly.incidents (
    time_ms, kind, topic, subscription, source, id, position, count, worker, detail
) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10);

-- name: note_position
-- Incidents of one message of a subscription each, found by its position. What is claimed is in
-- the log unless it was erased: then nothing of it is to be kept, nor what its handler said of it.
insert into duly.incidents (
    time_ms, kind, topic, subscription, source, id, position, count, worker, detail
)
select r.time_ms, r.kind,
    (select t.name from duly.streams s join duly.topics t on t.topic_no = s.topic_no
     where s.stream = (r.position >> 40)),
    (select name from duly.subscriptions u where u.subscription_no = r.subscription_no),
    m.source, m.id, r.position, r.count, r.worker,
    case when m.id is null and r.kind in ('retry', 'dead-letter') then 'erased' else r.detail end
from unnest(
        $1::bigint[], $2::text[], $3::int[], $4::bigint[], $5::bigint[], $6::text[], $7::text[]
    ) as r (time_ms, kind, subscription_no, position, count, worker, detail)
    left join duly.messages m on m.place = duly.place_of(r.position);


-- ===== retention ==============================================================================

-- name: all_streams
select s.stream, t.retention_s from duly.streams s join duly.topics t on t.topic_no = s.topic_no
where exists (select 1 from duly.cursors c where c.stream = s.stream) order by s.stream;

-- name: low_water
-- Below it every subscription of the stream has settled or parked all.
select min(at) from (
    select ($1::bigint << 40) | min(c.next_seq) as at
    from duly.streams s join duly.subscriptions u on u.topic_no = s.topic_no
        join lateral (
            select next_seq from duly.cursors c
            where c.subscription_no = u.subscription_no and c.stream = s.stream
            order by next_seq desc limit 1
        ) c on true
    where s.stream = $1::bigint
    union all
    select min(first) from duly.claims
    where first >= $1::bigint << 40 and first < ($1::bigint + 1) << 40
) as marks;

-- name: first_kept
-- And when it was made: the log is nearly in the order of time.
select r.position + m.place - r.place, m.time_ms from duly.runs r join lateral (
    select place, time_ms from duly.messages
    where place >= r.place + greatest($1::bigint - r.position, 0)
    and place < r.place + least($2::bigint - r.position, r.count)
    order by place limit 1
) m on true
where r.position >= coalesce(
    (select max(p.position) from duly.runs p where p.position <= $1::bigint), $1::bigint
) and r.position < $2::bigint
order by r.position limit 1;

-- name: any_parked
select exists (
    select 1 from duly.streams s join duly.subscriptions u on u.topic_no = s.topic_no
        join duly.parked p on p.subscription_no = u.subscription_no
    where s.stream = $3::bigint and p.position between $1::bigint and $2::bigint
);

-- name: trim_all
-- Of one stretch. By array, and by where the rows lie, which nobody changes: so each is found at
-- once, however many the planner takes them for, and it need not plan anew each time. What was
-- parked when somebody looked may be claimed by now, and parked again: this statement sees it as one
-- or the other, or deletes nothing.
delete from duly.messages where ctid = any (array(
    select m.at
    from (
        select * from (
            values (($1::bigint[])[1], ($2::bigint[])[1], ($3::bigint[])[1])
        ) as q (first, last, horizon_ms)
        where not exists (
            select 1 from duly.claims c
            where c.first between (q.first >> 40) << 40 and q.last
        ) and not exists (
            select 1 from duly.streams s join duly.subscriptions u on u.topic_no = s.topic_no
                join duly.parked p on p.subscription_no = u.subscription_no
            where s.stream = q.first >> 40 and p.position between q.first and q.last
        )
        offset 0
    ) q cross join lateral (
        select * from duly.runs r
        where r.position >= coalesce(
            (select max(p.position) from duly.runs p where p.position <= q.first), q.first
        ) and r.position <= q.last
    ) r cross join lateral (
        select m.ctid as at, m.time_ms from duly.messages m
        where m.place >= r.place + greatest(q.first - r.position, 0)
        and m.place < r.place + least(q.last + 1 - r.position, r.count)
        order by m.place limit r.count
    ) m
    where m.time_ms <= q.horizon_ms
));

-- name: trim
-- Parked ones stay: a message that waits for long does not keep those around it.
delete from duly.messages where place = any (array(
    select m.place
    from (
        select * from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[])
            as q (first, last, horizon_ms, stream)
        where not exists (
            select 1 from duly.claims c where c.first between q.stream << 40 and q.last
        )
        offset 0
    ) q cross join lateral duly.stretch(q.first, q.last) m
    where m.time_ms <= q.horizon_ms and not exists (
        select 1 from duly.streams s join duly.subscriptions u on u.topic_no = s.topic_no
            join duly.parked p on p.subscription_no = u.subscription_no
        where s.stream = q.stream and p.position = m.position
    )
));

-- name: forget_runs
-- The oldest of a stream whose messages are gone; its latest stays, for it tells where it ends.
delete from duly.runs where position in (
    select r.position from duly.runs r
    where r.position >= $1::bigint << 40 and r.position < $2::bigint
    and not exists (
        select 1 from duly.messages m where m.place >= r.place and m.place < r.place + r.count
    )
    and exists (
        select 1 from duly.runs l where l.position > r.position
        and l.position < ($1::bigint + 1) << 40
    )
    order by r.position limit $3::int
);

-- name: forget_cursors
-- What later ones have taken the place of.
delete from duly.cursors c using (
    select subscription_no, stream, max(next_seq) as next_seq from duly.cursors
    group by subscription_no, stream
) l
where c.subscription_no = l.subscription_no and c.stream = l.stream and c.next_seq < l.next_seq;

-- name: identities_after
-- The end of the next stretch of identities to look at.
select topic_no, source, id from duly.identities
where (topic_no, source, id) > ($1::bigint, $2::text, $3::text)
order by topic_no, source, id limit 1 offset $4::int;

-- name: forget_old
delete from duly.identities i
where (topic_no, source, id) > ($1::bigint, $2::text, $3::text)
and (topic_no, source, id) <= ($4::bigint, $5::text, $6::text)
and time_ms < $7::bigint - 1000 * (
    select identity_retention_s from duly.topics t where t.topic_no = i.topic_no
);

-- name: forget_incidents
-- The oldest, where they are too old or too many.
delete from duly.incidents where incident_id in (
    select incident_id from duly.incidents
    where time_ms < $1::bigint
    or incident_id <= (select max(incident_id) from duly.incidents) - $2::bigint
    order by incident_id limit $3::int
);


-- ===== looking inside =========================================================================

-- name: subscription_states
select u.name, t.name,
    coalesce(sum(b.backlog), 0)::bigint, coalesce(sum(b.in_flight), 0)::bigint,
    coalesce(sum(b.parked), 0)::bigint,
    (select count(*) from duly.dead d where d.subscription_no = u.subscription_no)
from duly.subscriptions u
    join duly.topics t on t.topic_no = u.topic_no
    join duly.streams s on s.topic_no = t.topic_no
    cross join lateral (
        select
            coalesce((
                select r.position + r.count - (s.stream << 40) from duly.runs r
                where r.position >= s.stream << 40 and r.position < (s.stream + 1) << 40
                order by r.position desc limit 1
            ), 1) - (
                select c.next_seq from duly.cursors c
                where c.subscription_no = u.subscription_no and c.stream = s.stream
                order by c.next_seq desc limit 1
            ) + coalesce((
                select sum(a.count) from duly.arrivals a where a.stream = s.stream
            ), 0) + coalesce((
                select sum(f.last - f.first + 1) from duly.claims f
                where f.subscription_no = u.subscription_no and f.token is null
                and (f.first >> 40) = s.stream
            ), 0) as backlog,
            (
                select sum(o.last - o.first + 1) from duly.claims o
                where o.subscription_no = u.subscription_no and o.token is not null
                and (o.first >> 40) = s.stream
            ) as in_flight,
            (
                select count(*) from duly.parked p where p.subscription_no = u.subscription_no
                and p.position >= s.stream << 40 and p.position < (s.stream + 1) << 40
            ) as parked
    ) b
-- A removed one has no cursor.
where exists (select 1 from duly.cursors c where c.subscription_no = u.subscription_no)
group by u.subscription_no, u.name, t.name order by u.name, t.name;

-- name: all_holders
select o.worker, u.name, t.name, sum(o.last - o.first + 1)::bigint
from duly.claims o
    join duly.subscriptions u on u.subscription_no = o.subscription_no
    join duly.topics t on t.topic_no = u.topic_no
where o.token is not null group by u.name, t.name, o.worker order by u.name, t.name, o.worker;

-- name: oldest
-- Of each subscription and stream: the first after the cursor, and the oldest claimed or parked.
select u.name, t.name, least(
    coalesce((
        select m.time_ms from duly.runs r join lateral (
            select time_ms from duly.messages
            where place >= r.place + greatest((s.stream << 40 | c.next_seq) - r.position, 0)
            and place < r.place + r.count order by place limit 1
        ) m on true
        where r.position >= coalesce((
            select max(p.position) from duly.runs p where p.position <= s.stream << 40 | c.next_seq
        ), s.stream << 40)
        and r.position < (s.stream + 1) << 40
        order by r.position limit 1
    ), 1::bigint << 62),
    coalesce((
        select m.time_ms from duly.arrivals a join duly.messages m on m.place = a.place
        where a.stream = s.stream order by a.place limit 1
    ), 1::bigint << 62),
    coalesce((
        select min(m.time_ms) from duly.claims f
            join duly.messages m on m.place = duly.place_of(f.first)
        where f.subscription_no = u.subscription_no and (f.first >> 40) = s.stream
    ), 1::bigint << 62),
    coalesce((
        select min(m.time_ms) from duly.parked p
            join duly.messages m on m.place = duly.place_of(p.position)
        where p.subscription_no = u.subscription_no
        and p.position >= s.stream << 40 and p.position < (s.stream + 1) << 40
    ), 1::bigint << 62)
)
from duly.subscriptions u
    join duly.topics t on t.topic_no = u.topic_no
    join duly.streams s on s.topic_no = t.topic_no
    join lateral (
        select next_seq from duly.cursors c
        where c.subscription_no = u.subscription_no and c.stream = s.stream
        order by next_seq desc limit 1
    ) c on true;

-- name: dead_letters
select u.name, d.topic, d.source, d.id, d.key, d.time_ms, d.headers, d.due_ms, d.body,
    d.error, d.attempts, d.dead_ms, d.dead_id, d.replays
from duly.dead d join duly.subscriptions u on u.subscription_no = d.subscription_no
where ($1::text is null or u.name = $1::text) and ($2::text is null or d.topic = $2::text)
and ($3::text is null or d.id = $3::text)
and ($4::text is null or strpos(d.error, $4::text) > 0)
and ($5::bigint is null or d.dead_ms >= $5::bigint)
and ($6::bigint is null or d.dead_ms < $6::bigint) and ($7::bigint is null or d.dead_id < $7::bigint)
order by d.dead_id desc limit $8::int;

-- name: incidents
select time_ms, kind, topic, subscription, source, id, position, count, worker, detail
from duly.incidents
where ($1::text is null or subscription = $1::text) and ($2::text is null or kind = $2::text)
order by incident_id desc limit $3::int;

-- name: incident_counts
select coalesce(subscription, topic, ''), kind, sum(count)::bigint from duly.incidents
group by 1, 2;
