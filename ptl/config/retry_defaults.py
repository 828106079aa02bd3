"""How often a step is tried on a cluster, unless the config says otherwise.

Apart from the config: the process that starts a step's attempts is kept small, and imports no pydantic.
"""

RETRIES = 2  # further attempts
RETRY_WAIT = 60  # seconds before the first of them
