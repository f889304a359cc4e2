"""What only Kafka can get wrong, on nodes that the tests start."""
