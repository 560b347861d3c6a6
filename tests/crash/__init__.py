"""
The crash proof: the service is killed again and again, at random moments and at named points, and nothing that it has
acknowledged may be lost or done twice.

`harness` sends callbacks and kills; `child` is the service with `points` at which it kills itself; `destinations` count
what really happened. `make crash KILLS=200` runs it, `test_crash.py` a little of it.
"""
