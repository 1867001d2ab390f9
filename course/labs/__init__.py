"""What the cells of one lesson each call: toys, counts and measurements that are not the engine."""
