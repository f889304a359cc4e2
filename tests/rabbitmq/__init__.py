"""What only RabbitMQ can get wrong, on nodes that the tests start."""
