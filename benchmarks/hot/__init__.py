"""What a user would build instead: the item path beside the same ranker in four other servers, and with no server.

Question: how many requests per second, each one user and 500 items, does Sightline's `rank_items` answer with 99 % of
    them within 10 ms, beside FastAPI, LitServe, BentoML and Ray Serve on the same machine, and how much of its time is
    the server's?
Contenders: every peer in the plain form that one writes first (user and tokens from the LMDB feature store, embed.onnx,
    score.onnx; JSON), and once more with Sightline's own engine inside (binary bodies), so that the design and the
    server under it can be told apart. Workers and threads of the peers by a sweep, the best kept.
Regime: one machine, shared by server and client; a generated catalogue, a ranker of the demo's shape with random
    weights, candidates by Zipf's law, everything warm. Every answer's scores are held against the plain work's first.
Floors: both forms of the work in a process of their own, one request after the other; the generator against a server
    that does nothing.
Method: open loop, Poisson arrivals, latency from the time that a request was due; the highest rate within the limit by
    bisection; fixed rates, the same for all; servers one after the other, in rotated order over the rounds; medians.
docs/benchmarks.md has the rules in full.
"""
