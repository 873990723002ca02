"""Records come in from Kafka, become jobs or rejections, and their offsets are kept until they are answered."""
