"""Real processes on real files, killed, stopped and starved, and judged by their histories.

``python -m duly.testing.chaos --minutes 10 --seed 3`` runs publishers and workers of every
guarantee on SQLite files while processes are killed, paused past their leases and drained, disks
are full, clocks are stepped and locks are held by strangers. Everybody records what they do;
`duly.testing.checker` judges it, with the final state read from the resources themselves.
"""
