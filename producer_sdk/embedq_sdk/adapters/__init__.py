"""embedq for frameworks: each module needs the framework of its name, which the extra of that name brings."""
