"""An hour under fire: a mixture of requests, every answer judged, and what is lost over time.

`mixture` says what is asked, a pure function of a seed; `needles` makes prompts whose answers are
known; `judging` tells right from wrong; `driver` asks over HTTP; `processes` and `record` keep what
the server used. `m3-plugin soak` puts them together.
"""
