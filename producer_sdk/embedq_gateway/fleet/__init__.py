"""The replicas behind the queue, as the status topic shows them."""
