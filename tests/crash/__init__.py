"""The crash test: kill the service many times, and check that nothing acknowledged is lost or done twice.

`harness` kills at random moments and at named points while `shoppers` send callbacks. `child` is the service, with
`points` at which it kills itself. `destinations` count what really happened. `make crash KILLS=200` runs it,
`test_crash.py` runs a small part.
"""
