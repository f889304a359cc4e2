-- What each part of duly's schema on PostgreSQL knows about its own version.

-- name: create_meta
-- oldest: of the code that may use the part's tables.
create table if not exists duly.meta (
    part text primary key,
    version integer not null,
    oldest integer not null default 1
);

-- name: take_meta
-- Nobody is in the middle of a transaction, and none begins. Tables of schema 1 had no oldest.
lock table duly.meta in access exclusive mode;
alter table duly.meta add column if not exists oldest integer not null default 1;

-- name: version_of
select version, coalesce((to_jsonb(m) ->> 'oldest')::int, 1) from duly.meta m where part = $1;

-- name: set_version
insert into duly.meta (part, version, oldest) values ($1, $2, $3)
on conflict (part) do update set version = excluded.version, oldest = excluded.oldest;

-- name: left_behind
select version, oldest from duly.meta where oldest > $1::int order by oldest desc limit 1;

-- name: current_place
-- Whether a commit here survives, and which database of which server this is.
select current_setting('synchronous_commit'), s.system_identifier, d.oid::bigint
from pg_control_system() s, pg_database d where d.datname = current_database();
