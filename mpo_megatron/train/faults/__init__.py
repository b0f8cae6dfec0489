"""Faults of a run, and how it stops.

    supervisor           what is watched: ranks that hang, ranks that are slow, the time that is left
    incidents            steps that look wrong
    signals, stopping    requests to stop; when all ranks stop
    spreading            requests that reach the ranks which no `mpo train` has launched
    agreement, ending    what one rank does for all; how a rank ends, and who says what went wrong

What all ranks must call together says so.
"""
