import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.Executors;

/** A shop on the JVM: a catalogue and an index on the heap, and orders that are kept. */
public final class Shop {
    record Item(int number, String name, String text, int price, int group) {}

    private static final int ITEMS = 12000;
    private final List<Item> items = new ArrayList<>();
    private final Map<String, List<Item>> index = new HashMap<>();
    private final Map<Integer, List<String>> orders = new HashMap<>();
    private final String[] words = new String[4000];

    private Shop() {
        Random random = new Random(7);
        for (int n = 0; n < words.length; n++) {
            StringBuilder word = new StringBuilder();
            for (int left = 3 + random.nextInt(7); left > 0; left--) {
                word.append((char) ('a' + random.nextInt(26)));
            }
            words[n] = word.toString();
        }
        for (int n = 0; n < ITEMS; n++) {
            Item item = new Item(n, text(random, 3), text(random, 40), 100 + random.nextInt(99900), random.nextInt(100));
            items.add(item);
            for (String word : item.text().split(" ")) {
                index.computeIfAbsent(word, w -> new ArrayList<>()).add(item);
            }
        }
    }

    private String text(Random random, int count) {
        List<String> some = new ArrayList<>();
        for (int n = 0; n < count; n++) {
            some.add(words[random.nextInt(words.length)]);
        }
        return String.join(" ", some);
    }

    private synchronized String answer(String path) {
        String[] parts = path.split("/");
        int number = Integer.parseInt(parts.length > 2 ? parts[2] : "0");
        StringBuilder page = new StringBuilder("<html>");
        switch (parts.length > 1 ? parts[1] : "") {
            case "search" -> index.getOrDefault(words[number % words.length], List.of()).stream()
                .sorted(Comparator.comparingInt(Item::price)).limit(20)
                .forEach(item -> page.append(String.format("<li>%s: %.2f</li>", item.name(), item.price() / 100.0)));
            case "order" -> {
                List<String> kept = orders.computeIfAbsent(number % ITEMS, n -> new ArrayList<>());
                kept.add(items.get(number % ITEMS).name());
                page.append(kept.size());
            }
            case "item" -> {
                Item item = items.get(number % ITEMS);
                page.append("<h1>").append(item.name()).append("</h1>").append(item.text());
                items.stream().filter(other -> other.group() == item.group()).skip(number % 50).limit(8)
                    .forEach(other -> page.append("<li>").append(other.name()).append("</li>"));
            }
            default -> page.append("open");
        }
        return page.append("</html>").toString();
    }

    private void serve(HttpExchange exchange) throws IOException {
        byte[] body = answer(exchange.getRequestURI().getPath()).getBytes(StandardCharsets.UTF_8);
        exchange.sendResponseHeaders(200, body.length);
        try (var out = exchange.getResponseBody()) {
            out.write(body);
        }
    }

    public static void main(String[] arguments) throws IOException {
        Shop shop = new Shop();
        HttpServer server = HttpServer.create(new InetSocketAddress(8082), 0);
        server.createContext("/", shop::serve);
        server.setExecutor(Executors.newFixedThreadPool(2));
        server.start();
    }
}
