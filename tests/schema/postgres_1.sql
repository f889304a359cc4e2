-- duly's tables of schema 1 on PostgreSQL, as its code made them; `duly.` stands for the schema.


create table if not exists duly.meta (part text primary key, version integer not null);

create sequence if not exists duly.batches;
create sequence if not exists duly.tokens;
create sequence if not exists duly.workers;

create table if not exists duly.ticks (
    tick_no bigint primary key,
    snapshot pg_snapshot not null,
    system_identifier bigint not null
);

insert into duly.ticks (tick_no, snapshot, system_identifier)
select 0, '1:1:'::pg_snapshot, system_identifier from pg_control_system()
on conflict do nothing;

create table if not exists duly.clock (
    only_row integer primary key check (only_row = 1),
    boot_id text not null,
    offset_ms bigint not null
);

insert into duly.clock values (1, 'server', 0) on conflict do nothing;

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

alter table duly.messages alter body set storage external;

create table if not exists duly.arrivals (
    xid xid8 not null default pg_current_xact_id(),
    stream bigint not null,
    place bigint not null,
    count integer not null,
    largest integer not null,
    latest_due_ms bigint not null
);

create index if not exists arrivals_xid on duly.arrivals (xid);

create table if not exists duly.runs (
    position bigint primary key,
    place bigint not null,
    count integer not null,
    largest integer not null,
    latest_due_ms bigint not null
);

create table if not exists duly.identities (
    topic_no bigint not null,
    time_ms bigint not null,
    place bigint not null,
    source text not null,
    id text not null,
    hash bytea not null,
    primary key (topic_no, source, id)
);

create table if not exists duly.subscriptions (
    subscription_no integer generated always as identity primary key,
    name text not null,
    topic_no bigint not null references duly.topics,
    guarantee text not null,
    order_by_key boolean not null,
    hold_key_on_dead boolean not null,
    unique (name, topic_no)
);

create table if not exists duly.cursors (
    subscription_no integer not null,
    stream bigint not null,
    next_seq bigint not null,
    primary key (subscription_no, stream, next_seq)
);

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

create or replace function duly.place_of(bigint) returns bigint language sql stable as $$
    select r.place + ($1 - r.position) from (
        select position, place, count from duly.runs where position <= $1
        order by position desc limit 1
    ) r where $1 < r.position + r.count
$$;

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

create table if not exists duly.inbox_flows (
    flow_no bigint generated always as identity primary key,
    consumer text not null,
    topic text not null,
    source text not null,
    unique (consumer, topic, source)
);

create table if not exists duly.inbox (
    flow_no bigint not null,
    id text collate "C" not null,
    hash bigint not null,
    time_ms bigint not null,
    mark bigint not null,
    primary key (flow_no, id)
);

create table if not exists duly.log_cursors (
    consumer text not null,
    log text not null,
    next_offset bigint not null,
    epoch bigint not null,
    primary key (consumer, log)
) with (fillfactor = 50);

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

create table if not exists duly.outbox_refused (
    position bigint primary key,
    attempts integer not null,
    error text not null,
    due_ms bigint
);

create table if not exists duly.outbox_relay (
    one boolean primary key check (one),
    relay text not null,
    until_ms bigint not null
) with (fillfactor = 50);

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

create index if not exists log_dead_by_offset on duly.log_dead (consumer, log, "offset");
