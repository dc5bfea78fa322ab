"""The inspector: a web page that shows the sessions of a running server at work.

A small web server that is a gRPC client like any other. `__main__.py` starts it, `app.py` has its routes,
`recorder.py` keeps what it sees of a session, and `static/` is the page, without a build step. It imports neither
`server` nor torch.
"""
