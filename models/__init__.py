"""Torch modules and checkpoint loading. No sockets, no event loop: a model is handed a communicator."""
