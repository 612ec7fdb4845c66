"""What is compiled before it is needed, for this machine or for another."""
