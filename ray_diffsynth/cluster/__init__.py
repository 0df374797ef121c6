"""The machines of a job: which Ray it is on, and how many actors or workers it has there, as pure functions."""
