"""What clients may send: pydantic models of the requests, and how they become legal engine parameters."""
