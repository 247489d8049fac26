"""What both sides agree on; imports neither server nor client."""
