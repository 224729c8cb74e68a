"""Others' protocols in front of drift.v1, so that their clients work unchanged; served only when asked for.

Each adapter turns a request of its protocol into a drift.v1 GenerateRequest, and the answers back. It knows no engine
and no admission of its own: what drift.v1 refuses is refused here, with the status that protocol's clients expect.
"""
