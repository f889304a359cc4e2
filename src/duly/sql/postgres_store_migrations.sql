-- The same for what a store has in its database, which may be in another one than any log.


-- name: migration_2
-- oldest: 1
-- Nothing of a store's changes.
select 1;
