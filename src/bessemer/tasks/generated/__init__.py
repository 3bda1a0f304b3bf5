"""Items made from a seed: retrieval at growing lengths, variable tracking, arithmetic by difficulty."""
