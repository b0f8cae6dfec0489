"""Faults of a run, and how it stops.

    supervisor           watches for ranks that hang, slow ranks, and the time limit
    incidents            suspicious steps
    signals, stopping    requests to stop; when all ranks stop
    spreading            requests for ranks that no `mpo train` has launched
    agreement, ending    work of one rank for all; how a rank ends, and which one reports the error

Functions that all ranks must call together say so.
"""
