"""What the processes at both ends of many connections share. It imports nothing that takes long."""

import resource

NO_REPLY = 0  # in place of an HTTP status


def allow_many() -> None:
    """Allows this process as many connections as the system does.

    A server that refuses nothing has one for each request that waits, and so has its client.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
