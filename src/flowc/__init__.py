"""flowc: an optimising compiler and runtime for RAG and multi-agent programs."""
