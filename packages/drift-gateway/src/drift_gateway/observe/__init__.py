"""What is kept and said of requests and lanes: counts, records, spans, readings. Looks on; changes nothing."""
