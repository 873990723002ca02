"""`embedq dev`: a real Apache Kafka and a real Redis as processes of the caller."""
