"""How often a step is tried on a cluster, unless the config says otherwise; it imports nothing."""

RETRIES = 2  # attempts after the first one
RETRY_WAIT = 60  # seconds before the first further attempt
