"""The engine on a Ray cluster: a corpus in Ray Data, the command `funnel embed-corpus`, and a deployment of Ray Serve.

Modules import JAX late: a worker first learns which devices Ray gave it.
"""
