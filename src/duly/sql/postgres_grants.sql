-- What a role needs that publishes, works and operates, where another owns duly's schema. Run it as
-- the owner, after duly was started once by that owner (or: duly adopt URL), with the role's name for
-- duly_app and, where it is another, the schema's for duly. It lets the role make nothing, own
-- nothing and touch no other schema. The last three are for tables of later versions, which the
-- owner makes by starting duly once after an upgrade.
grant usage on schema duly to duly_app;
grant select, insert, update, delete on all tables in schema duly to duly_app;
grant usage on all sequences in schema duly to duly_app;
grant execute on all functions in schema duly to duly_app;
grant execute on function pg_control_system() to duly_app;
alter default privileges in schema duly grant select, insert, update, delete on tables to duly_app;
alter default privileges in schema duly grant usage on sequences to duly_app;
alter default privileges in schema duly grant execute on functions to duly_app;
