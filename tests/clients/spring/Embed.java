import java.util.Arrays;
import java.util.List;

import org.springframework.ai.document.MetadataMode;
import org.springframework.ai.embedding.EmbeddingResponse;
import org.springframework.ai.openai.OpenAiEmbeddingModel;
import org.springframework.ai.openai.OpenAiEmbeddingOptions;
import org.springframework.ai.openai.api.OpenAiApi;

/** Embeds its arguments after the first, the gateway's address, and prints a line of float bits for each. */
public final class Embed {
    public static void main(String[] arguments) {
        OpenAiApi api = OpenAiApi.builder().baseUrl(arguments[0]).apiKey("none").build();
        OpenAiEmbeddingOptions options = OpenAiEmbeddingOptions.builder().model("default").build();
        OpenAiEmbeddingModel model = new OpenAiEmbeddingModel(api, MetadataMode.EMBED, options);
        List<String> texts = Arrays.asList(arguments).subList(1, arguments.length);
        EmbeddingResponse response = model.embedForResponse(texts);
        response.getResults().forEach(result -> {
            StringBuilder line = new StringBuilder("vector");
            for (float value : result.getOutput()) {
                line.append(' ').append(Float.floatToIntBits(value));
            }
            System.out.println(line);
        });
        System.out.println("tokens " + response.getMetadata().getUsage().getTotalTokens());
    }
}
