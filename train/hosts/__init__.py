"""The processes of a run: how they agree, and how they are told to stop."""
