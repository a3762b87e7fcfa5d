"""The rank side: a blocking loop around a ``Worker``, and what it finds in its context."""
