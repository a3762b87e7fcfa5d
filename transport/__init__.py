"""Bytes on the wire: frames, codec, records, sockets. No torch, no processes, no requests."""
