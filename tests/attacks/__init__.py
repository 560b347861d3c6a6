"""Attacks on a running service, each beside honest traffic: `python -m tests.attacks NAME`, or `make attack`.

`harness` starts the service and measures, `honest` sends the traffic of an ordinary day. `connections`, `orders` and
`outside` hold the attacks, by the parts of `docs/security.md`. `test_attacks` runs those that need no load.
"""
