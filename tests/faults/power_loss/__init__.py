"""Power loss: what the disk may hold when the lights go out between two syncs.

`recording` takes down the real writes and syncs of a duly process, `images` builds from them
what the disk may hold at some moment, and the test opens each of those with duly.
"""
