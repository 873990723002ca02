"""The embedding service: jobs from Kafka, vectors back. Start reading at `service.py`."""
